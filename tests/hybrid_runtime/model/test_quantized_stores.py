"""A q8 or q4 store computes exactly the model whose weights are its dequantised ones."""

from __future__ import annotations

import pytest
import torch

from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat

from .published_models import (
    RANKS,
    SPARSE_LLAMA,
    TURBOSPARSE_MISTRAL,
    TURBOSPARSE_MIXTRAL,
    VOCAB,
    dense_tensors,
    turbosparse_mixtral_tensors,
)
from .tiny_models import TOLERANCE, difference, load, logits_of, random_tokens, write_folder

TOKENS = random_tokens(VOCAB)
MODELS = {
    "llama": (SPARSE_LLAMA | {"model_type": "llama", "hidden_act": "silu"}, dense_tensors),
    "turbosparse-mistral": (TURBOSPARSE_MISTRAL, lambda: dense_tensors(RANKS, shift=0.4, seed=3)),
    "turbosparse-mixtral": (TURBOSPARSE_MIXTRAL, lambda: turbosparse_mixtral_tensors(shift=0.4, seed=3)),
}
# Of normally distributed weights: 8 bits leave 0.5 %, 4 bits with a least-squares scale a group leave 7 to 9 %.
ERRORS = {"q8": (0.001, 0.01), "q4": (0.03, 0.12)}
MIXTRAL_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def dequantized(store, model_type):
    """The store's weights in float32, by published name."""
    tensors = {}
    for part in store.manifest.parts:
        for name, weight in store.read_part(part):
            if isinstance(weight, torch.Tensor):
                tensors[published_name(name, model_type)] = weight.clone()
            elif isinstance(weight, Bundles):
                ffn = name.removesuffix(".bundles")
                for projection in ("gate_proj", "up_proj"):
                    tensors[published_name(f"{ffn}.{projection}", model_type)] = dense(getattr(weight, projection))
                tensors[published_name(f"{ffn}.down_proj", model_type)] = dense(weight.down_proj_t).T
            else:
                tensors[published_name(name, model_type)] = dense(weight)
    return tensors


def dense(matrix):
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format).clone()


def published_name(name, model_type):
    if model_type == "turbosparsemixtral":
        name = name.replace(".mlp.router", ".block_sparse_moe.gate").replace(
            ".mlp.experts", ".block_sparse_moe.experts"
        )
        for ours, theirs in MIXTRAL_NAMES.items():
            name = name.replace(ours, theirs) if ".experts." in name else name
    return (name if name == "lm_head" else f"model.{name}") + ".weight"


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


CASES = [(name, RowFormat(kind, 32)) for name in MODELS for kind in ("q8", "q4")]
CASES += [("llama", RowFormat("q8", 64)), ("turbosparse-mistral", RowFormat("q4", 128))]


@pytest.mark.parametrize(("name", "row_format"), CASES, ids=str)
def test_a_quantised_store_is_the_model_of_its_dequantised_weights(tmp_path, name, row_format):
    config, make = MODELS[name]
    original = make()
    packed = load(write_folder(tmp_path / "original", config, original), tmp_path / "packed", row_format)
    tensors = dequantized(packed.store, config["model_type"])
    assert tensors.keys() == original.keys()
    plain = load(write_folder(tmp_path / "dequantized", config, tensors), tmp_path / "plain")
    for mode in ("off", *(["mask"] if packed.config.predictor_input else [])):
        assert difference(packed, TOKENS, logits_of(plain, TOKENS, mode=mode), mode=mode) <= TOLERANCE, mode
    for weight, tensor in original.items():
        error = relative_error(tensors[weight], tensor)
        if tensor.dim() == 1 or "block_sparse_moe.gate" in weight:
            assert error == 0  # norms and routers stay float32
        else:
            kind = "q8" if "embed" in weight or "lm_head" in weight else row_format.kind
            lowest, highest = ERRORS[kind]
            assert error < highest, weight
            assert error > lowest or tensor.shape[1] < 32, weight  # a few columns can be fitted nearly exactly
