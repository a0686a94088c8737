"""One finished run that many tests look at, and one thread for all of them."""

from __future__ import annotations

import pytest
import torch

from .tiny_runs import train, write_corpus_text


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_corpus_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="session")
def finished_swiglu(tmp_path_factory, text):
    """The folder of a finished run."""
    run = tmp_path_factory.mktemp("runs") / "swiglu"
    assert train(text, run, "--activation=swiglu", "--save-dtype=f32", "--save-every=5", "--test-every=10") == 0
    return run
