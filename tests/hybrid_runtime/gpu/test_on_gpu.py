"""The interpreter's tests on a GPU, in their own process: their models are of other sizes than all others'."""

from pathlib import Path

import pytest
import torch

from tests.own_process import run_tests


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_and_the_cpu_make_what_one_memory_makes():
    run_tests(Path(__file__).parent / "interpreted_decoder.py", 900, HYBRID_TEST_DEVICE="cuda:0")
