"""Synthetic stores, each made once for all tests that look at it."""

from __future__ import annotations

import pytest
import torch

from hybrid_runtime.progress import NoProgress
from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices: two threads that wait for each other take thirty times as long beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """make(like, **request) -> the store."""
    stores = {}

    def make_once(like, **options):
        key = (like, *sorted(options.items()))
        if key not in stores:
            folder = tmp_path_factory.mktemp("synthetic") / "store"
            stores[key] = make_synthetic(SyntheticRequest(like, **options), folder, NoProgress())
        return stores[key]

    return make_once
