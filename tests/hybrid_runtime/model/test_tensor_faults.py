"""Tensors that are missing, unknown, doubled or of another shape than the config says: refused, each by its name."""

from __future__ import annotations

import pytest
import torch

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.errors import CheckpointError

from .published_models import HIDDEN, INTER, TURBOSPARSE_MISTRAL, TURBOSPARSE_MIXTRAL, VOCAB, dense_tensors
from .refused_models import LLAMA, OPT, QWEN2, refusal, tensors_of
from .tiny_models import random_tensors, write_folder

FC1, FC2 = "model.layers.1.mlp.predictor.fc1.weight", "model.layers.1.mlp.predictor.fc2.weight"
WRONG_TENSORS = {
    "unknown": (
        LLAMA,
        {"model.layers.0.mlp.extra.weight": (3, 3)},
        "tensor model.layers.0.mlp.extra.weight is none of a llama model's",
    ),
    "unknown-layer-name": (
        LLAMA,
        {"model.layers.00.input_layernorm.weight": (HIDDEN,)},
        "has unknown tensors layers.00.input_layernorm",
    ),
    "missing": (LLAMA, {"model.norm.weight": None}, "lacks tensors norm"),
    "missing-many": (
        LLAMA,
        {f"model.layers.{idx}.self_attn.{each}_proj.weight": None for idx in range(3) for each in "qkvo"},
        "layers.0.self_attn.v_proj, layers.1.self_attn.k_proj and 7 more",
    ),
    "missing-head": (LLAMA, {"lm_head.weight": None}, "lacks tensors lm_head"),
    "norm-of-two-dimensions": (
        LLAMA,
        {"model.norm.weight": (HIDDEN, 1)},
        "tensor model.norm.weight has shape [36, 1], config says [36]",
    ),
    "transposed-down": (
        LLAMA,
        {"model.layers.2.mlp.down_proj.weight": (INTER, HIDDEN)},
        "tensor model.layers.2.mlp.down_proj.weight has shape [51, 36], config says [36, 51]",
    ),
    "gate-in-arcee": (
        LLAMA | {"model_type": "arcee", "hidden_act": "relu2"},
        {},
        "has unknown tensors layers.0.mlp.gate_proj",
    ),
    "output-bias-in-qwen2": (
        QWEN2,
        {"model.layers.0.self_attn.o_proj.bias": (HIDDEN,)},
        "has unknown tensors layers.0.self_attn.o_proj.bias",
    ),
    "predictor-in-llama": (
        LLAMA,
        {FC1: (4, HIDDEN), FC2: (INTER, 4)},
        "predictor tensors in a llama model, whose code does not use any",
    ),
    "predictor-chaining": (
        TURBOSPARSE_MISTRAL,
        {FC2: (INTER, 4)},
        "layers.1.mlp.predictor.fc2 reads 4 values, fc1 makes 9",
    ),
    "predictor-half": (TURBOSPARSE_MISTRAL, {FC2: None}, "lacks tensors layers.1.mlp.predictor.fc2"),
    "predictor-width": (
        TURBOSPARSE_MISTRAL,
        {FC1: (9, HIDDEN + 1)},
        "layers.1.mlp.predictor.fc1.weight has shape [9, 37], config says ['rank', 36]",
    ),
    "predictor-neurons": (
        TURBOSPARSE_MISTRAL,
        {FC2: (INTER - 1, 9)},
        "fc2.weight has shape [50, 9], config says [51, 'rank']",
    ),
    "predictor-bias": (
        TURBOSPARSE_MISTRAL,
        {"model.layers.1.mlp.predictor.fc1.bias": (9,)},
        "tensor model.layers.1.mlp.predictor.fc1.bias is none of a bamboo",
    ),
    "predictor-of-one-expert": (
        TURBOSPARSE_MIXTRAL,
        {f"model.layers.2.block_sparse_moe.experts.4.predictor.fc{each}.weight": None for each in (1, 2)},
        "lacks tensors layers.2.mlp.experts.4.predictor.fc1, layers.2.mlp.experts.4.predictor.fc2",
    ),
    "router-rows": (
        TURBOSPARSE_MIXTRAL,
        {"model.layers.0.block_sparse_moe.gate.weight": (4, HIDDEN)},
        "block_sparse_moe.gate.weight has shape [4, 36], config says [5, 36]",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_a_wrong_tensor_is_refused_by_its_name(tmp_path, name):
    config, shapes, part = WRONG_TENSORS[name]
    tensors = tensors_of(config)
    for tensor, shape in shapes.items():
        if shape is None:
            del tensors[tensor]
        else:
            tensors[tensor] = torch.ones(shape)
    assert part in refusal(write_folder(tmp_path / "model", config, tensors), CheckpointError)


def test_one_weight_under_two_names_is_refused(tmp_path):
    names = ("model.decoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    folder = write_folder(tmp_path / "model", OPT, random_tensors(dict.fromkeys(names, (VOCAB, HIDDEN))))
    message = refusal(folder, CheckpointError)
    assert all(name in message for name in (*names, "are both embed_tokens"))


def test_buffers_that_follow_from_the_config_and_a_written_out_tied_head_are_left_alone(tmp_path):
    tensors = dense_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    checkpoint = open_checkpoint(write_folder(tmp_path / "model", LLAMA | {"tie_word_embeddings": True}, tensors))
    assert "lm_head" not in checkpoint.tensors
    assert not any("inv_freq" in name for name in checkpoint.tensors)
