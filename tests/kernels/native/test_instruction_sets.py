"""Which instructions are chosen, what is refused, and that the portable ones compute the same on this machine."""

import os
import subprocess
import sys

import llvmlite.binding as llvm
import pytest

from hybrid_kernels.native import load
from hybrid_kernels.native.instruction_sets import INSTRUCTION_SETS, VARIABLE, choose_instruction_set, instruction_set

AVX2 = {"avx2", "fma", "f16c"}
TABLE = {
    "Zen 4": (AVX2 | {"avx512f", "avx512vl", "avx512vnni"}, "avx512vnni"),
    "Sapphire Rapids": (AVX2 | {"avx512vl", "avx512vnni", "avxvnni"}, "avx512vnni"),
    "Alder Lake": (AVX2 | {"avxvnni"}, "avxvnni"),
    "VNNI of 512 bits only": (AVX2 | {"avx512f", "avx512vnni"}, "avx2"),
    "Haswell": (AVX2, "avx2"),
    "AVX2 without FMA": ({"avx2", "f16c"}, "portable"),
    "AVX2 without F16C": ({"avx2", "fma"}, "portable"),
    "Sandy Bridge": ({"avx"}, "portable"),
    "Neoverse N1": ({"neon", "dotprod"}, "neon-dotprod"),
    "Cortex-A72": ({"neon"}, "portable"),
    "unknown": (set(), "portable"),
}


@pytest.mark.parametrize(("features", "expected"), TABLE.values(), ids=TABLE)
def test_the_best_that_a_processor_has_is_chosen(features, expected):
    assert choose_instruction_set(dict.fromkeys(features, True)) == expected
    absent = dict.fromkeys({"avx2", "fma", "f16c", "avxvnni", "avx512vl", "avx512vnni", "dotprod"} - features, False)
    assert choose_instruction_set(dict.fromkeys(features, True) | absent) == expected


def on_processor(monkeypatch, features, wanted=None):
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
    monkeypatch.delenv(VARIABLE, raising=False)
    if wanted is not None:
        monkeypatch.setenv(VARIABLE, wanted)
    return instruction_set.__wrapped__()


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        (AVX2, None),
        (AVX2, "avx2"),
        (AVX2, "portable"),
        (AVX2 | {"avxvnni"}, "avx2"),
        (AVX2 | {"avxvnni"}, "portable"),
        ({"dotprod"}, "neon-dotprod"),
        ({"dotprod"}, "portable"),
        (set(), "portable"),
    ],
)
def test_another_one_may_be_asked_for(monkeypatch, features, wanted):
    assert on_processor(monkeypatch, features, wanted) == wanted or (wanted is None and features == AVX2)


@pytest.mark.parametrize("wanted", ["avx512vnni", "avxvnni", "neon-dotprod"])
def test_what_the_processor_does_not_have_is_refused(monkeypatch, wanted):
    with pytest.raises(ValueError, match=rf"{VARIABLE}={wanted}: this processor has only avx2, portable"):
        on_processor(monkeypatch, AVX2, wanted)


@pytest.mark.parametrize("wanted", ["AVX2", "", "sse2"])
def test_a_name_that_is_none_is_refused(monkeypatch, wanted):
    with pytest.raises(ValueError, match=rf"{VARIABLE}={wanted}: is not one of {', '.join(INSTRUCTION_SETS)}"):
        on_processor(monkeypatch, AVX2, wanted)


# What a process with portable kernels prints: the largest relative differences from the references.
PORTABLE = """
import json, torch
from hybrid_kernels.linear.op import linear
from hybrid_kernels.linear.reference import rounded_linear
from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.reference import quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.team import Team
from kernels.kernel_calls import project

torch.manual_seed(0)
team, found = Team(2), {"set": instruction_set()}
for kind, group in (("q4", 32), ("q8", 64)):
    row_format = RowFormat(kind, group)
    weight, x = PackedMatrix(quantize_rows(torch.randn(33, 300), row_format), 300, row_format), torch.randn(5, 300)
    expected = rounded_linear(x, weight)
    for name, product in (("batch", linear(x, weight, team=team)),
                          ("token", torch.stack([project(team, each.contiguous(), weight) for each in x]))):
        found[f"{name} {kind}"] = ((product - expected).norm() / expected.norm()).item()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_portable_kernels_compute_the_same_on_this_machine(tmp_path):
    import json  # noqa: PLC0415

    tests = str(load.PACKAGES.parent / "tests")
    search = os.pathsep.join([str(load.PACKAGES), tests, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ran = subprocess.run(
        [sys.executable, "-c", PORTABLE],
        env=os.environ | {VARIABLE: "portable", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("set") == "portable"
    assert len(found) == 4
    assert all(difference < 1e-5 for difference in found.values()), found
