"""hybrid-doctor shows the machine and what is kept of its speeds; nothing is measured here."""

import json
import re
from dataclasses import replace

import pytest

from hybrid_runtime.speeds import machine_speeds as module
from hybrid_runtime.speeds.kernel_speeds import measure_kernel_speeds
from hybrid_tools.doctor import main
from tests.hybrid_runtime.placement.made_up import GPU, Q4, kernel_of, speeds_of


@pytest.fixture
def measured(monkeypatch):
    """Stands in for measuring; what was asked for."""
    calls = []

    def apart(measure, *arguments):
        if measure is measure_kernel_speeds:
            calls.append(str(arguments[0]))
            return replace(kernel_of(arguments[0]), num_threads=arguments[1])
        _, identity, num_threads, folder = arguments
        folder.mkdir(exist_ok=True)
        calls.append("machine")
        return replace(
            speeds_of(cache_bytes=32 << 20), identity=identity, num_threads=num_threads, gpu=apart.gpu, kernels=()
        )

    apart.gpu = None
    monkeypatch.setattr(module, "_apart", apart)
    calls.append(apart)
    return calls


@pytest.fixture
def run(measured, capsys, tmp_path):
    def run(*arguments):
        capsys.readouterr()
        code = main([*arguments, "--cache-dir", str(tmp_path / "cache"), "--threads", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


def test_the_machine_and_its_speeds_are_shown(run, measured):
    code, out, err = run()
    assert code == 0
    assert len(err) == 2
    assert measured[1:] == ["machine", str(Q4)]
    for pattern in (
        r"processor +.+, \d+ cores, \d+ usable threads",
        r"caches +32\.00 MiB in the last level",
        r"memory +[\d.]+ [GTM]iB, [\d.]+ [GTM]iB free now",
        r"software +Python 3\.\S+, torch \S+, Numba \S+",
        r"measured +2026-01-01T00:00:00Z, with 1 threads:",
        r"  memory read +20\.0 GB/s",
        rf"  {Q4}, rows in order +16\.0 GB/s",
        rf"  {Q4}, single rows +8\.0 GB/s",
        rf"  {Q4}, in caches +64\.0 GB/s",
        rf"  {Q4}, an operation +4\.0 us, a row 8 ns",
        rf"  {Q4}, a token besides +0\.0 us",
        r"  disk, reads of 4 KiB +50000 a second",
        r"  disk, reads of 64 KiB +1\.00 GB/s",
    ):
        assert re.search(f"(?m)^{pattern}$", out), (pattern, out)
    assert "GPU memory" not in out
    _, again, err = run()
    assert (err, len(measured)) == ([], 3)  # nothing was measured again
    lines = [[line for line in each.splitlines() if "free now" not in line] for each in (out, again)]
    assert lines[0] == lines[1]


def test_a_gpu_is_shown(run, measured):
    measured[0].gpu = GPU
    out = run()[1]
    for line in ("  GPU memory                400.0 GB/s", "  to the GPU, from it        20.0, 20.0 GB/s",
                 "  there and back             10.0 us, a launch 2.0 us"):  # fmt: skip
        assert " ".join(line.split()) in [" ".join(each.split()) for each in out.splitlines()], out


def test_measure_measures_again(run, measured):
    run()
    code, _, err = run("--measure")
    assert (code, len(err)) == (0, 2)
    assert measured[1:] == ["machine", str(Q4)] * 2


def test_other_weights_are_measured_beside(run, measured):
    run()
    code, out, err = run("--quant", "f32")
    assert (code, len(err)) == (0, 1)
    assert measured[1:] == ["machine", str(Q4), "f32"]
    assert f"{Q4}, rows in order" in out
    assert "f32, rows in order" in out


def test_json_has_all_of_it(run):
    code, out, _ = run("--json")
    assert code == 0
    answer = json.loads(out)
    assert set(answer) == {"machine", "speeds"}
    assert answer["machine"]["usable_cores"] >= 1
    assert answer["speeds"]["memory_bytes_per_s"] == 20e9
    assert answer["speeds"]["kernels"][0]["row_kind"] == "q4"


def test_a_disk_without_direct_reads_is_told(run, monkeypatch):
    found = module._apart

    def apart(measure, *arguments):
        made = found(measure, *arguments)
        return made if measure is measure_kernel_speeds else replace(made, disk=replace(made.disk, past_cache=False))

    monkeypatch.setattr(module, "_apart", apart)
    assert "50000 a second (through the page cache: this file system has no direct reads)" in run()[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quant", "q5"), "Invalid value for '--quant'"),
        (("--nothing",), "No such option"),
        (("more",), "unexpected extra argument"),
    ],
)
def test_bad_options_are_refused_in_a_line(run, measured, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err[-1].startswith("hybrid-doctor: ")
    assert message in err[-1]
    assert len(measured) == 1


def test_a_cache_that_cannot_be_is_refused_by_name(measured, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    code = main(["--cache-dir", str(tmp_path / "file" / "cache"), "--threads", "1"])
    assert code == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_help_names_what_measuring_takes_and_the_default(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "takes some ten seconds and 1.5 GiB of memory" in text
    assert "[default: q4]" in text
