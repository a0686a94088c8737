"""Stores written by hand from a configuration: what the reader must accept, and what the tests of refusals damage."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.store.layout import Entry, Quantization
from hybrid_runtime.store.manifest import MANIFEST, Manifest

FORMATS = [
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES),
]
Q4 = RowFormat("q4", 32)
DATA = "data-0123456789abcdef"

SMALL = {
    "family": "llama",
    "vocab_size": 37,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "activation": Activation("relu_glu"),
    "norm_eps": 1e-5,
    "rope": RopeConfig(10000.0),
}
EXPERTS = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "predictor_input": "post_norm",
    "predictor_is_part_of_model": True,
}
BIASED = {
    "activation": Activation("relu"),
    "norm": "layer",
    "rope": None,
    "learned_position_offset": 2,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
}
# name -> (configuration, ranks of its predictors)
CONFIGS = {
    "dense": (ModelConfig(**SMALL), {}),
    "biased": (ModelConfig(**SMALL | BIASED), {}),
    "experts": (
        ModelConfig(**SMALL | EXPERTS),
        {f"layers.{layer}.mlp.experts.{expert}": 5 + layer + expert for layer in range(2) for expert in range(3)},
    ),
    "one of everything": (
        ModelConfig(
            **SMALL
            | dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), 1)
            | {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
        ),
        {},
    ),
}


def write_store(
    folder: Path, name: str = "dense", row_format: RowFormat = Q4
) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """A complete store of random weights; its manifest, and the bytes of every entry by name."""
    config, ranks = CONFIGS[name]
    generator = torch.Generator().manual_seed(0)
    manifest = Manifest(name, config, Quantization(row_format), ranks, DATA, {}, "a fingerprint")
    (folder / DATA).mkdir(parents=True)
    written = {}
    for part in manifest.parts:
        block = bytearray(part.num_bytes)
        for entry in part.entries:
            written[entry.name] = random_bytes(entry, generator)
            block[entry.offset : entry.offset + entry.num_bytes] = written[entry.name].numpy().tobytes()
        (folder / DATA / part.file).write_bytes(block)
        manifest.sha256[part.file] = hashlib.sha256(block).hexdigest()
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest, written


def random_bytes(entry: Entry, generator: torch.Generator) -> torch.Tensor:
    """Nothing here computes with them, so any bytes will do."""
    *rows, columns = entry.shape
    row_bytes = 4 * columns if entry.kind == "vector" else entry.row_format.row_bytes(columns)
    return torch.randint(0, 256, (*rows, row_bytes), dtype=torch.uint8, generator=generator)


def damage(folder: Path, **changes: object) -> None:
    """Replace fields of store.json; None removes one, a name with dots lies inside another."""
    values = json.loads((folder / MANIFEST).read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        target = values
        for each in outer:
            target = target[each]
        if value is None:
            del target[last]
        else:
            target[last] = value
    (folder / MANIFEST).write_text(json.dumps(values))
