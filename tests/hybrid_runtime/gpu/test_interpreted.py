"""Runs interpreted*.py where Triton interprets: it decides that when it is imported, once for a process."""

import sys
from pathlib import Path

import pytest

from tests.own_process import run_tests

if sys.platform != "linux":
    pytest.skip("Triton is for Linux only", allow_module_level=True)
FILES = sorted(Path(__file__).parent.glob("interpreted*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_gpu_and_the_cpu_make_what_one_memory_makes(file):
    assert "skipped" not in run_tests(file, 480, TRITON_INTERPRET="1")
