"""The same tests on a GPU, in their own process: their models are of other sizes than the rest of the tests'."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_and_the_cpu_make_what_one_memory_makes():
    file = Path(__file__).parent / "interpreted_decoder.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"HYBRID_TEST_DEVICE": "cuda"}
    environment.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parents[3]
    done = subprocess.run(command, check=False, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:]
