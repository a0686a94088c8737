"""The look at the machine, shown other machines as small trees of /proc and /sys, and this one as it is."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from hybrid_runtime import machine

GIB = 2**30
X86 = (
    "processor\t: {n}\nmodel name\t: Fast CPU 9000\nphysical id\t: {socket}\ncore id\t\t: {core}\n"
    "flags\t\t: fpu sme smep sse2 ssse3 avx avx2 {more}\npower management:\n"
)
ARM = (
    "processor\t: 0\nFeatures\t: fp asimd fphp asimddp sve i8mm\nCPU part\t: 0xd40\n\n"
    "processor\t: 1\nFeatures\t: fp asimd fphp asimddp\nCPU part\t: 0xd40\n\n"
    "Hardware\t: Board\nModel\t: Board 4\n"
)
MEMINFO = f"MemTotal:       {64 * GIB // 1024} kB\nMemFree:  10 kB\nMemAvailable:   {40 * GIB // 1024} kB\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "{n} 31 0:32 {root} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v1_mounts(root: str) -> str:
    return "".join(V1_MOUNT.format(n=n, root=root, name=name) for n, name in ((32, "cpu,cpuacct"), (33, "memory")))


def test_name_cores_and_instruction_sets_of_an_x86(tmp_path):
    # two sockets of two cores of two threads; the second socket lacks avx512f, so code cannot count on it
    cpus = [(n, n // 4, n // 2 % 2, "avx512f fma" if n < 4 else "fma") for n in range(8)]
    text = "\n".join(X86.format(n=n, socket=socket, core=core, more=more) for n, socket, core, more in cpus)
    root = tree(tmp_path, {"proc/cpuinfo": text})
    assert machine.cpu_name(root) == "Fast CPU 9000"
    assert machine.physical_cores(root) == 4
    assert machine.instruction_sets(root) == ("avx", "avx2", "fma", "sse2", "ssse3")  # sme is memory encryption here


def test_the_kernels_topology_counts_before_core_ids(tmp_path):
    # core ids repeat over clusters, sibling lists do not
    siblings = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n // 2 * 2}-{n // 2 * 2 + 1}\n"
                for n in range(6)}  # fmt: skip
    cpuinfo = "\n".join(X86.format(n=n, socket=0, core=0, more="") for n in range(6))
    root = tree(tmp_path, {"proc/cpuinfo": cpuinfo, "sys/devices/system/cpu/cpufreq/boost": "1", **siblings})
    assert machine.physical_cores(root) == 3


def test_an_arm_without_model_name_and_core_ids(tmp_path):
    root = tree(tmp_path, {"proc/cpuinfo": ARM})
    assert machine.cpu_name(root) not in {"", "Board 4"}  # the board's paragraph is no processor
    assert machine.physical_cores(root) == 2
    assert machine.instruction_sets(root) == ("asimd", "asimddp", "fphp")


@pytest.mark.parametrize(
    ("cpu_max", "usable"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
    ],
    ids=["unlimited", "4", "2.5", "half", "16", "empty"],
)
def test_a_cpu_quota_cuts_the_affinity_down(tmp_path, cpu_max, usable):
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/cpu.max": cpu_max + "\n",
    }
    assert machine.usable_cores(tree(tmp_path, files), num_allowed=8) == usable


@pytest.mark.parametrize(("quota", "usable"), [("-1", 8), ("300000", 3)])
def test_a_cpu_quota_of_cgroup_v1(tmp_path, quota, usable):
    files = {
        "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n",
        "proc/self/mountinfo": v1_mounts("/"),
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
    }
    assert machine.usable_cores(tree(tmp_path, files), num_allowed=8) == usable


def test_the_tightest_cgroup_above_the_process_binds(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user.slice/session\n",
        "proc/self/mountinfo": "22 1 8:1 / / rw - ext4 /dev/sda rw\n" + V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/user.slice/cpu.max": "200000 100000",
        "sys/fs/cgroup/user.slice/session/cpu.max": "600000 100000",
        "sys/fs/cgroup/user.slice/memory.max": str(16 * GIB),
        "sys/fs/cgroup/user.slice/memory.current": str(10 * GIB),
        "sys/fs/cgroup/user.slice/session/memory.max": str(8 * GIB),
        "sys/fs/cgroup/user.slice/session/memory.current": str(1 * GIB),
        "sys/fs/cgroup/other/memory.max": "4096",
    }
    root = tree(tmp_path, files)
    assert machine.usable_cores(root, num_allowed=8) == 2
    assert machine.ram_limit_bytes(root) == 8 * GIB
    assert machine.available_ram_bytes(root) == 6 * GIB  # what the slice has left; the session alone would have 7
    assert machine.total_ram_bytes(root) == 64 * GIB


def test_page_cache_counts_as_available(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/memory.max": str(10 * GIB),
        "sys/fs/cgroup/memory.current": str(9 * GIB),
        "sys/fs/cgroup/memory.stat": f"anon {2 * GIB}\nactive_file {4 * GIB}\ninactive_file {3 * GIB}\n",
    }
    assert machine.available_ram_bytes(tree(tmp_path, files)) == 8 * GIB


def test_memory_high_is_a_limit_too(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/"),
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.high": str(5 * GIB),
        "sys/fs/cgroup/memory.current": str(6 * GIB),
    }
    root = tree(tmp_path, files)
    assert machine.ram_limit_bytes(root) == 5 * GIB
    assert machine.available_ram_bytes(root) == 0  # over its limit, never negative


def test_a_container_on_cgroup_v1_that_sees_its_own_group_as_the_top(tmp_path):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        "proc/self/mountinfo": v1_mounts("/docker/abc"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB // 2}\ntotal_active_file 0\n",
    }
    root = tree(tmp_path, files)
    assert machine.ram_limit_bytes(root) == 2 * GIB
    assert machine.available_ram_bytes(root) == 3 * GIB // 2


@pytest.mark.parametrize("mounted", ["/kube", "/"])
@pytest.mark.parametrize("path", ["/../other", "/elsewhere", "/"])
def test_a_cgroup_outside_the_mount_leaves_the_mounts_own_limit(tmp_path, path, mounted):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNT.format(root=mounted),
        "sys/fs/cgroup/memory.max": str(3 * GIB),
        "sys/fs/other/memory.max": "4096",
    }
    assert machine.ram_limit_bytes(tree(tmp_path, files)) == 3 * GIB


@pytest.mark.parametrize("limit", ["9223372036854771712", "max"], ids=["v1-none", "v2-none"])
def test_without_a_memory_limit_the_machine_is_the_limit(tmp_path, limit):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/\n0::/\n",
        "proc/self/mountinfo": v1_mounts("/"),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": limit,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
    }
    root = tree(tmp_path, files)
    assert machine.ram_limit_bytes(root) == 64 * GIB
    assert machine.available_ram_bytes(root) == 40 * GIB


def test_resident_memory_is_read_from_status(tmp_path):
    root = tree(tmp_path, {"proc/self/status": "Name:\tx\nVmPeak:\t9 kB\nVmHWM:\t    7000 kB\nVmRSS:\t    5000 kB\n"})
    assert machine.peak_rss_bytes(root) == 7000 * 1024
    assert machine.current_rss_bytes(root) == 5000 * 1024


@pytest.mark.parametrize("emptied", [False, True], ids=["proc", "fallback"])
def test_the_peak_follows_an_allocation_and_outlives_it(tmp_path, emptied):
    root = tmp_path if emptied else Path("/")
    # in a fresh process, whose peak nothing else has raised; every page is touched
    code = (
        "import sys; from pathlib import Path; from hybrid_runtime.machine import *\n"
        "root = Path(sys.argv[1]); before = peak_rss_bytes(root); start = current_rss_bytes(root)\n"
        "block = bytearray(b'x') * (256 << 20); during = current_rss_bytes(root); del block\n"
        "print(before, start, during, peak_rss_bytes(root), current_rss_bytes(root))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
    before, start, during, peak, after = (int(number) for number in done.stdout.split())
    slack = 16 << 20  # the kernel adds up what each CPU has counted only now and then
    assert during - start == pytest.approx(256 << 20, abs=slack)
    assert peak >= during - slack
    assert after < during - (256 << 20) + slack
    if not emptied:  # ru_maxrss may start at the parent's peak
        assert peak <= during + slack
        assert before <= peak - (256 << 20) + slack


def test_huge_pages_are_counted_where_the_system_tells(tmp_path):
    assert (
        machine.huge_page_bytes(tree(tmp_path, {"proc/self/smaps_rollup": "x\nAnonHugePages:    4096 kB\n"})) == 4 << 20
    )
    assert machine.huge_page_bytes(tmp_path / "nothing") == 0


def test_the_peak_can_begin_anew_where_the_system_can():
    torch.zeros(1 << 24)  # 64 MiB, gone at once
    before = machine.peak_rss_bytes()
    if machine.reset_peak_rss():
        assert machine.peak_rss_bytes() < before - (1 << 24)
    assert not machine.reset_peak_rss(Path("/nowhere"))


def test_without_proc_other_sources_answer_alike(tmp_path):
    assert machine.total_ram_bytes(tmp_path) == psutil.virtual_memory().total
    assert machine.ram_limit_bytes(tmp_path) == psutil.virtual_memory().total
    assert 0 < machine.available_ram_bytes(tmp_path) <= psutil.virtual_memory().total
    assert machine.physical_cores(tmp_path) == (psutil.cpu_count(logical=False) or os.cpu_count())
    assert machine.usable_cores(tmp_path, num_allowed=3) == 3
    assert machine.cpu_name(tmp_path)
    kernel_names = {name.replace("_", ".") for name in machine.instruction_sets()}
    assert {"avx2", "fma", "asimd", "neon"} & kernel_names <= set(machine.instruction_sets(tmp_path)) | {"asimd"}


def test_this_machine_describes_itself_consistently():
    found = machine.describe_machine()
    assert 1 <= found.usable_cores <= os.cpu_count()
    assert 1 <= found.physical_cores <= os.cpu_count()
    assert 0 < found.available_ram_bytes <= found.ram_limit_bytes <= found.total_ram_bytes
    assert found.python_version == ".".join(str(part) for part in sys.version_info[:3])
    assert found.torch_version == torch.__version__
    assert (found.vram_bytes > 0) == (found.gpu_name is not None) == torch.cuda.is_available()
    assert (found.no_gpu_reason is None) == torch.cuda.is_available()
    assert json.loads(json.dumps(asdict(found)))["cpu_name"] == found.cpu_name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no CPU affinity")
def test_affinity_counts_as_it_is_when_asked():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


class FakeCuda:
    """torch.cuda as it looks on a machine with the given GPU, or with one that refuses to be opened."""

    def __init__(self, gpu: SimpleNamespace | RuntimeError | None) -> None:
        self.gpu = gpu

    def is_available(self) -> bool:
        return self.gpu is not None

    def get_device_properties(self, device: int) -> SimpleNamespace:
        assert device == 0
        assert self.gpu is not None, "asked for a GPU that torch had said is not there"
        if isinstance(self.gpu, RuntimeError):
            raise self.gpu
        return self.gpu


def test_a_gpu_is_named_with_its_memory():
    gpu = SimpleNamespace(name="GPU 4090", total_memory=24 * GIB)
    assert machine._gpu(FakeCuda(gpu)) == ("GPU 4090", 24 * GIB, None)


def test_a_gpu_that_torch_does_not_offer_is_none_with_a_reason():
    name, vram_bytes, reason = machine._gpu(FakeCuda(None))
    assert (name, vram_bytes) == (None, 0)
    assert "is_available() is False" in reason


def test_a_gpu_that_refuses_is_none_with_its_own_words():
    name, vram_bytes, reason = machine._gpu(FakeCuda(RuntimeError("CUDA error: device is busy")))
    assert (name, vram_bytes) == (None, 0)
    assert "device is busy" in reason


def test_importing_the_module_loads_no_torch_and_no_psutil():
    code = "import sys, hybrid_runtime.machine as m; sys.exit(bool({'torch', 'psutil', 'llvmlite'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
