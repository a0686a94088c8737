"""Weights that were rounded before they were published: their q8 store gives them back."""

import json

import pytest
import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.errors import NumericsError
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.reader import open_store
from hybrid_runtime.store.stored_weights import StoredWeights
from hybrid_runtime.stores import ModelRequest, convert_model
from hybrid_tools.training.initial import checkpoint_weights, random_weights
from hybrid_tools.training.recipe import Shape
from hybrid_tools.training.rounding import rounded_weights

from .tiny_runs import train

Q8 = RowFormat("q8", 32)
CONFIG = Shape(
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
).config(Activation("drelu"), 300, 1, 2)


def unpacked(folder):
    """Every weight of a store as float32, by the store's names."""
    store = open_store(folder)
    source = StoredWeights(store)
    f32 = RowFormat("f32")
    weights = {}
    for part in store.manifest.parts:
        for entry in part.entries:
            wanted = type(entry)(entry.name, entry.kind, entry.shape, f32, 0)
            data = torch.cat([block.flatten() for block in source.blocks(wanted)])
            weights[entry.name] = data.view(torch.float32).view(entry.shape)
    return weights


@pytest.mark.parametrize("options", [(), ("--tie-embeddings",)], ids=["own-head", "tied"])
def test_q8_store_gives_back_what_was_published(options, text, tmp_path):
    """Bit for bit, in bf16; of what the same run publishes without rounding it gives back little."""
    run = tmp_path / "run"
    for name, more in (("plain", ()), ("rounded", ("--round-to=q8",))):
        assert train(text, run, *options, *more, tokens=512) == 0  # the second only writes the model again
        assert json.loads((run / "model" / "training.json").read_text())["rounded_to"] == ("q8" if more else None)
        checkpoint = open_checkpoint(run / "model")
        published = checkpoint_weights(checkpoint, checkpoint.config)
        request = ModelRequest(str(run / "model"), "q8")
        stored = unpacked(convert_model(request, tmp_path / name, tmp_path / "cache", NoProgress()).folder)
        for layer_idx, expert_idx in ((0, 0), (1, 3)):
            ffn = f"layers.{layer_idx}.mlp.experts.{expert_idx}"
            gate, up, down = stored[f"{ffn}.bundles"].unbind(1)
            stored |= {f"{ffn}.gate_proj": gate, f"{ffn}.up_proj": up, f"{ffn}.down_proj": down.T}
        both = stored.keys() & published.keys()
        assert len(both) == (1 + 1 + 2 * (2 + 4 + 1) + 2 * 3) + ("lm_head" in published)
        for key in both:
            same = (stored[key].bfloat16() == published[key].bfloat16()).float().mean()
            if name == "rounded" or key.endswith(("norm", "router")):
                assert same == 1, key
            else:
                assert same < 0.9, key


def test_rounded_weights_are_the_nearest_levels():
    weights = random_weights(CONFIG, 1)
    for name, weight in rounded_weights(CONFIG, weights, Q8, torch.float32).items():
        rows, before = (each.T if name.endswith("down_proj") else each for each in (weight, weights[name]))
        if name.endswith(("norm", "router")):
            assert torch.equal(rows, before)
            continue
        groups, after = before.unflatten(-1, (-1, 32)), rows.unflatten(-1, (-1, 32))
        half_level = groups.abs().amax(-1, keepdim=True) / 127 / 2
        assert ((after - groups).abs() <= 1.01 * half_level).all(), name
        assert ((after - groups).abs() > 0.5 * half_level).any(), name


def test_weight_that_no_scale_holds_is_named():
    weights = random_weights(CONFIG, 1)
    weights["layers.1.self_attn.o_proj"][3, 5] = 1e9
    with pytest.raises(NumericsError, match=r"layers\.1\.self_attn\.o_proj cannot be rounded to q8"):
        rounded_weights(CONFIG, weights, Q8, torch.bfloat16)
