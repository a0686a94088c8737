"""A small dense dReLU model as a store, with a profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hybrid_runtime.engine import OpenModel, open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.profiling.profile import Profile
from hybrid_runtime.profiling.profile_file import read_profile
from hybrid_runtime.stores import ModelRequest
from hybrid_tools.convert import main as convert
from hybrid_tools.profile import main as profile
from tests.hybrid_runtime.small_models import LLAMA, write_model

DENSE = LLAMA | {"architectures": ["BambooForCausalLM"], "model_type": "bamboo", "hidden_act": "relu"}
TEXT = "Hello world, once upon a time there was a neuron and the others and a layer. " * 40


@dataclass(frozen=True, slots=True)
class Dense:
    folder: Path
    opened: OpenModel
    profile: Profile

    @property
    def profile_folder(self) -> Path:
        return self.folder / "profile"

    @property
    def config(self):
        return self.opened.store.manifest.config


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Dense:
    folder = tmp_path_factory.mktemp("dense")
    write_model(folder / "checkpoint", DENSE)
    (folder / "text").write_text(TEXT)
    assert convert([str(folder / "checkpoint"), "-o", str(folder / "store")]) == 0
    options = ["--text", str(folder / "text"), "--window", "64", "--tokens", "1024", "--threads", "1"]
    assert profile([str(folder / "store"), *options]) == 0
    opened = open_model(ModelRequest(str(folder / "store")), LoadOptions(num_positions=64, threads=1))
    return Dense(folder / "store", opened, read_profile(folder / "store" / "profile", opened.store.manifest.config))
