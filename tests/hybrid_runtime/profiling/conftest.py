"""Profiles of two small models, a dense one and a mixture, over different texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.profiling.run import ProfileRequest, make_profile
from hybrid_runtime.stores import ModelRequest, load_store_tokenizer
from hybrid_tools.convert import main as convert
from tests.hybrid_runtime.small_models import LLAMA, TURBOSPARSE, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
WINDOW = 32
SAMPLE_BYTES = 4000


@dataclass(frozen=True, slots=True)
class Small:
    """A store, and what profiles it."""

    store: object
    sequence: object
    tokenizer: object
    folder: Path

    @property
    def config(self):
        return self.store.manifest.config

    def profile(self, name, text, *, num_tokens=None, window=WINDOW, sample_bytes=SAMPLE_BYTES, restarts=False):
        """Leave in folder/name the profile of this text; its folder."""
        path = self.folder / f"{name}.txt"
        path.write_text(text)
        request = ProfileRequest((path,), num_tokens, window, sample_bytes, restarts)
        folder = self.folder / name
        make_profile(self.store, self.sequence, self.tokenizer, request, folder, lambda _: None)
        return folder


def text_of(seed, count=40):
    return "".join(
        f"Hello world {seed * 1000 + idx}, once upon a time the layer and a neuron. " for idx in range(count)
    )


class Heard:
    """A Progress that keeps what it is told."""

    def __init__(self):
        self.steps, self.running = [], False  # label, total, unit and how many were done, of each step

    def start(self, label, total, unit="bytes"):
        self.steps.append([label, total, unit, 0])
        self.running = True

    def advance(self, n):
        assert self.running
        self.steps[-1][3] += n

    def done(self):
        self.running = False


@pytest.fixture(scope="session", params=["dense", "mixture"])
def small(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_model(folder / "checkpoint", {"dense": DENSE, "mixture": TURBOSPARSE}[request.param])
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    opened = open_model(ModelRequest(str(folder / "store")), LoadOptions(num_positions=2 * WINDOW, threads=1))
    return Small(opened.store, opened.load_sequence(), load_store_tokenizer(opened.store)[0], folder)
