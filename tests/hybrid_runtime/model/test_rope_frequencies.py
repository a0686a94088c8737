"""Inverse frequencies of published settings equal transformers', at the sizes of real models."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.rope import parse_rope
from hybrid_runtime.model.rope_frequencies import rope_frequencies

PHI3 = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.02 * idx for idx in range(48)],
    "long_factor": [1.0 + 1.3 * idx for idx in range(48)],
    "original_max_position_embeddings": 4096,
}
SETTINGS = {
    "theta-1e4": ({"rope_type": "default", "rope_theta": 1e4}, 128, 32768),
    "theta-1.5e6": ({"rope_type": "default", "rope_theta": 1.5e6}, 128, 32768),
    "linear": ({"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}, 128, 16384),
    "llama-3.1": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        128,
        131072,
    ),
    "llama-3.2": (
        {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        64,
        131072,
    ),
    "qwen2.5-yarn": (
        {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
        128,
        131072,
    ),
    "deepseek-yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.5,
            "original_max_position_embeddings": 4096,
        },
        64,
        163840,
    ),
    "gpt-oss-yarn": (
        {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        64,
        131072,
    ),
    "yarn-of-one-dimension-pair": (
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16},
        2,
        64,
    ),
    "phi-3-factor": (PHI3 | {"factor": 32.0}, 96, 131072),
    "phi-3-attention-factor": (PHI3 | {"factor": 32.0, "attention_factor": 1.19}, 96, 131072),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("num_positions", [1, 4096, 4097])
def test_frequencies_and_magnitude_equal_transformers(name, num_positions):
    parameters, head_dim, max_positions = SETTINGS[name]
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=max_positions,
        rope_parameters=dict(parameters),
    )
    expected, magnitude = of_transformers(config, num_positions)
    rope = parse_rope(
        RawConfig({"rope_parameters": parameters, "max_position_embeddings": max_positions}, "config.json")
    )
    found, scale = rope_frequencies(rope, head_dim, num_positions)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert scale == pytest.approx(magnitude, rel=1e-12)


def of_transformers(config, num_positions):
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding(config).inv_freq, 1.0
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=num_positions)


@pytest.mark.parametrize("style", ["section", "beside", "old-names"])
def test_every_way_of_writing_the_same_longrope_is_read(style):
    section = {key: value for key, value in PHI3.items() if key != "rope_theta"}
    values = {"rope_theta": 10000.0, "max_position_embeddings": 131072, "rope_scaling": section}
    if style == "beside":  # as Phi-3 has it: beside the section, and there it wins
        values |= {"original_max_position_embeddings": 4096}
        section["original_max_position_embeddings"] = 99
    if style == "old-names":
        section["type"] = section.pop("rope_type")
    rope = parse_rope(RawConfig(values, "config.json"))
    assert rope.kind == "longrope"
    assert rope.original_max_position_embeddings == 4096
    assert rope.factor == 32.0
