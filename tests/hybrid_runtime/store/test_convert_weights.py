"""Every weight of a store is the published one, within what its format promises."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_kernels.quantization.reference import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.demo import make_demo

from .converting import FORMATS, contents, converted
from .synthetic import LLAMA, OPT, opt_shapes, random_tensors, write_llama, write_tensors

OPT_NAMES = {
    "decoder.final_layer_norm": "norm",
    "self_attn_layer_norm": "input_layernorm",
    "final_layer_norm": "post_attention_layernorm",
    "out_proj": "o_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
    "decoder.": "",
}
MIXTURE_NAMES = {
    "block_sparse_moe.gate": "mlp.router",
    "block_sparse_moe": "mlp",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}


def dense(folder):
    return write_llama(folder), {}


def dense_float16(folder):
    return write_llama(folder, dtype=torch.float16, hidden_act="silu", intermediate_size=1), {}


def ungated_with_biases(folder):
    return write_tensors(folder, OPT, random_tensors(opt_shapes(OPT), torch.float32)), OPT_NAMES


def mixture_with_predictors(folder):
    return make_demo(folder), MIXTURE_NAMES


def published_weights(model, renames):
    """Canonical name -> float32, by this test's own renaming."""
    weights = {}
    for published, tensor in load_file(model / "model.safetensors").items():
        name = published.removeprefix("model.").removesuffix(".weight")
        for theirs, ours in renames.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor.float()
    return weights


def stored_weights(store):
    """Canonical name -> (float32, format); neurons under their projections' names."""
    weights = {}
    for part in store.manifest.parts:
        for name, weight in store.read_part(part):
            if isinstance(weight, Bundles):
                ffn, down = name.removesuffix(".bundles"), weight.down_proj_t
                matrices = {"up_proj": weight.up_proj} | ({"gate_proj": weight.gate_proj} if weight.has_gate else {})
                weights |= {f"{ffn}.{key}": (as_float(matrix), weight.row_format) for key, matrix in matrices.items()}
                weights[f"{ffn}.down_proj"] = (as_float(down), weight.row_format)  # [I, H]: row i is column i
            elif isinstance(weight, PackedMatrix):
                weights[name] = (as_float(weight), weight.row_format)
            else:
                weights[name] = (weight, RowFormat("f32"))
    return weights


def as_float(matrix):
    return dequantize_rows(matrix.rows, matrix.columns, matrix.row_format)


def require_near(found, expected, row_format):
    """Within what the format promises: exact, rounded, half a level, or no worse than rounding to the extreme."""
    if row_format.kind == "f32":
        assert torch.equal(found, expected)
        return
    if row_format.kind == "bf16":
        assert torch.equal(found, expected.bfloat16().float())
        return
    padding = row_format.padded_columns(expected.shape[1]) - expected.shape[1]
    found, expected = (
        torch.nn.functional.pad(each, (0, padding)).reshape(-1, row_format.group) for each in (found, expected)
    )
    extremes = expected.gather(-1, expected.abs().argmax(dim=-1, keepdim=True))
    error = (found - expected).abs()
    if row_format.kind == "q8":
        level = extremes.abs() / 127
        assert (error <= level * (0.5 + 127 * 2**-11)).all()  # the scale is rounded to float16's 11 bits
        return
    level = extremes / -8
    rounded = (expected / torch.where(level == 0, 1, level)).round().clamp(-8, 7) * level
    bound = (rounded - expected).square().sum(-1).sqrt()
    assert (error.square().sum(-1).sqrt() <= bound + extremes.abs().squeeze(-1) * 2**-10 * row_format.group**0.5).all()


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("write", [dense, dense_float16, ungated_with_biases, mixture_with_predictors])
def test_every_weight_is_the_published_one_within_the_format(tmp_path, write, row_format):
    model, renames = write(tmp_path / "model")
    store = converted(model, tmp_path / "store", row_format)
    store.verify()
    expected, found = published_weights(model, renames), stored_weights(store)
    assert found.keys() == expected.keys()
    config, finer = store.manifest.config, ("embed_tokens", "embed_positions", "lm_head")
    if config.num_key_value_heads < config.num_attention_heads:
        finer = (*finer, "k_proj")
    for name, (weight, kept_in) in found.items():
        wanted = expected[name].T if name.endswith("down_proj") else expected[name]
        is_exact = wanted.dim() == 1 or "router" in name
        is_finer = name.endswith(finer) and row_format.kind == "q4"
        assert kept_in == (
            RowFormat("f32") if is_exact else RowFormat("q8", row_format.group) if is_finer else row_format
        )
        assert weight.shape == wanted.shape
        require_near(weight, wanted, kept_in)


def test_a_bundle_is_one_neurons_gate_row_up_row_and_down_column(tmp_path):
    model = write_llama(tmp_path / "model", dtype=torch.float32)
    store = converted(model, tmp_path / "store")
    weights = published_weights(model, {})
    bundles = dict(store.read_part(store.manifest.parts[2]))["layers.1.mlp.bundles"]
    hidden, inner = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    assert bundles.data.shape == (inner, 3, RowFormat("f32").row_bytes(hidden))
    for neuron in (0, 17, inner - 1):
        gate, up, down = bundles.data[neuron, :, : hidden * 4].contiguous().view(torch.float32)
        assert torch.equal(gate, weights["layers.1.mlp.gate_proj"][neuron])
        assert torch.equal(up, weights["layers.1.mlp.up_proj"][neuron])
        assert torch.equal(down, weights["layers.1.mlp.down_proj"][:, neuron])


def test_blocks_change_no_byte(tmp_path, monkeypatch):
    """A tensor larger than a block, cut at odd rows, is stored as one that fits."""
    model = write_llama(tmp_path / "model")
    whole = converted(model, tmp_path / "whole", RowFormat("q8", 32))
    monkeypatch.setattr("hybrid_runtime.store.blocks.BLOCK_WEIGHTS", 7 * LLAMA["hidden_size"])
    cut = converted(model, tmp_path / "cut", RowFormat("q8", 32))
    assert contents(cut.folder) == contents(whole.folder)


GGUF_SIZES = {"hidden": 64, "inner": 96, "heads": 2, "head_dim": 32, "vocab": 96}


def write_q4_0(path):
    """A one-layer GGUF in Q4_0; returns its values by canonical name, rotary rows as the file has them."""
    hidden, inner, vocab = (GGUF_SIZES[name] for name in ("hidden", "inner", "vocab"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_block_count(1)
    writer.add_head_count(GGUF_SIZES["heads"])
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    matrices = {
        "token_embd": ("embed_tokens", vocab, hidden),
        "output": ("lm_head", vocab, hidden),
        **{f"blk.0.attn_{key}": (f"layers.0.self_attn.{key}_proj", hidden, hidden) for key in "qkv"},
        "blk.0.attn_output": ("layers.0.self_attn.o_proj", hidden, hidden),
        "blk.0.ffn_gate": ("layers.0.mlp.gate_proj", inner, hidden),
        "blk.0.ffn_up": ("layers.0.mlp.up_proj", inner, hidden),
        "blk.0.ffn_down": ("layers.0.mlp.down_proj", hidden, inner),
    }
    random, values, q4_0 = np.random.default_rng(0), {}, gguf.GGMLQuantizationType.Q4_0
    for name, (canonical, rows, columns) in matrices.items():
        raw = gguf.quants.quantize(random.standard_normal((rows, columns), dtype=np.float32), q4_0)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=q4_0)
        values[canonical] = torch.from_numpy(gguf.quants.dequantize(raw, q4_0))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_q4_0_keeps_its_values_exactly_in_q4_group_32(tmp_path, monkeypatch):
    monkeypatch.setattr("hybrid_runtime.store.blocks.BLOCK_WEIGHTS", 7 * GGUF_SIZES["hidden"])  # cuts Q4_0's blocks
    values = write_q4_0(tmp_path / "model.gguf")
    found = stored_weights(converted(tmp_path / "model.gguf", tmp_path / "store", RowFormat("q4", 32)))
    for name, expected in values.items():
        weight, row_format = found[name]
        if name.endswith("down_proj"):
            require_near(weight, expected.T, row_format)  # its groups run the other way
        elif name.endswith(("q_proj", "k_proj")):  # row 2 i + j of a head is ours at j * D / 2 + i
            pairs = expected.view(GGUF_SIZES["heads"], GGUF_SIZES["head_dim"] // 2, 2, -1)
            assert torch.equal(weight, torch.cat([torch.cat((head[:, 0], head[:, 1])) for head in pairs])), name
        else:
            assert torch.equal(weight, expected), name
