"""Configs that contradict themselves or the weights: refused, naming the file and the key."""

from __future__ import annotations

import json

import pytest

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.errors import CheckpointError, UnsupportedModel, UsageError
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import parse_config

from .published_models import (
    INTER,
    SMALLTHINKER,
    SPARSE_LLAMA,
    TURBOSPARSE_MISTRAL,
    TURBOSPARSE_MIXTRAL,
    VOCAB,
    dense_tensors,
)
from .refused_models import LLAMA, MIXTRAL, OPT, QWEN2, refusal, tensors_of
from .tiny_models import write_folder

ABSENT = object()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}


def scaled(rope, **changes):
    return {"rope_scaling": {key: value for key, value in (rope | changes).items() if value is not ABSENT}}


def yarn(**changes):
    return scaled({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, **changes)


WRONG_KEYS = [
    (
        CheckpointError,
        LLAMA,
        [
            ({"vocab_size": VOCAB + 1}, "tensor model.embed_tokens.weight has shape [97, 36], config says [98, 36]"),
            ({"vocab_size": VOCAB - 1}, "tensor model.embed_tokens.weight has shape [97, 36], config says [96, 36]"),
            ({"intermediate_size": INTER + 1}, "gate_proj.weight has shape [51, 36], config says [52, 36]"),
            ({"hidden_size": 48}, "embed_tokens.weight has shape [97, 36], config says [97, 48]"),
            ({"num_hidden_layers": 2}, "has unknown tensors layers.2."),
            ({"num_hidden_layers": 4}, "lacks tensors layers.3.input_layernorm"),
            ({"tie_word_embeddings": ABSENT, "attention_bias": True}, "lacks tensors layers.0.self_attn.k_proj.bias"),
            ({"num_attention_heads": 5}, "hidden_size is 36, expected a multiple of num_attention_heads 5"),
            ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
            ({"num_key_value_heads": 3}, "k_proj.weight has shape [12, 36], config says [18, 36]"),
            ({"num_key_value_heads": ABSENT}, "k_proj.weight has shape [12, 36], config says [36, 36]"),
            ({"head_dim": 7}, "head_dim 7 is odd"),
            ({"head_dim": 0}, "head_dim is 0"),
            ({"num_attention_heads": 0}, "num_attention_heads is 0"),
            *(
                ({key: ABSENT}, f"{key} is None, expected")
                for key in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                )
            ),
            ({"vocab_size": "97"}, "vocab_size is '97', expected a whole number"),
            ({"vocab_size": 97.0}, "vocab_size is 97.0, expected a whole number"),
            ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a whole number"),
            ({"hidden_size": -36}, "hidden_size is -36, expected a whole number from 1"),
            ({"intermediate_size": 1 << 40}, "intermediate_size is 1099511627776, expected"),
            ({"max_position_embeddings": [1]}, "max_position_embeddings is [1], expected"),
            ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a finite number"),
            ({"rms_norm_eps": 0.0}, "eps is 0.0"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
            ({"eos_token_id": "2"}, "eos_token_id is '2', expected a token id"),
            ({"eos_token_id": [2, -1]}, "eos_token_id is [2, -1], expected a token id"),
            ({"model_type": 7}, "model_type is 7, expected a string"),
            ({"hidden_act": 3}, "hidden_act is 3, expected a string"),
            ({"rope_theta": 0.0}, "rope_theta is 0.0, expected a number above 0"),
            ({"rope_theta": -1e4}, "rope_theta is -10000.0, expected a number above 0"),
            ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta is 0"),
            ({"rope_scaling": 2.0}, "rope_scaling is 2.0, expected an object"),
            ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None, expected a finite number"),
            ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor is 0"),
            (scaled(LLAMA3, high_freq_factor=1.0), "rope_scaling: high_freq_factor is 1.0, expected a number above"),
            (scaled(LLAMA3, low_freq_factor=ABSENT), "rope_scaling: low_freq_factor is None"),
            (yarn(beta_fast=0), "rope_scaling: beta_fast is 0"),
            (yarn(truncate="no"), "rope_scaling: truncate is 'no', expected true or false"),
            (yarn() | {"rope_theta": 1.0}, "rope_theta is 1.0, expected a number above 1"),
            (yarn(original_max_position_embeddings=0), "original_max_position_embeddings is 0"),
            (scaled(LONGROPE, short_factor=[1.0] * 4), "longrope lists 4 factors, expected head_dim / 2 = 3"),
            (scaled(LONGROPE, long_factor=[1.0] * 2), "longrope lists 2 factors, expected head_dim / 2 = 3"),
            (scaled(LONGROPE, long_factor=[1.0, 0.0, 1.0]), "long_factor is (1.0, 0.0, 1.0), expected numbers above 0"),
            (scaled(LONGROPE, short_factor="ones"), "short_factor is 'ones', expected a list"),
            (scaled(LONGROPE, original_max_position_embeddings=1), "original_max_position_embeddings is 1"),
        ],
    ),
    (
        CheckpointError,
        MIXTRAL,
        [
            ({"num_local_experts": 0}, "num_local_experts is 0, expected"),
            ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, expected"),
            ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 is not between 1 and num_experts 5"),
        ],
    ),
    (
        CheckpointError,
        OPT,
        [
            ({"num_attention_heads": 5}, "hidden_size is 36, expected a multiple of num_attention_heads 5"),
        ],
    ),
    (
        CheckpointError,
        QWEN2,
        [
            (
                {"layer_types": ["full_attention"] * 2},
                "layer_types is ['full_attention', 'full_attention'], expected a list of 3",
            ),
            ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "layer_types is"),
        ],
    ),
    (
        CheckpointError,
        SMALLTHINKER,
        [
            ({"rope_layout": [1, 1]}, "rope_layout is [1, 1], expected a list of 3 zeros and ones"),
            ({"rope_layout": [1, 2, 1]}, "rope_layout is [1, 2, 1], expected"),
            ({"sliding_window_size": ABSENT}, "sliding_window_size is None, expected"),
            ({"moe_num_active_primary_experts": 9}, "num_experts_per_tok 9 is not between 1 and num_experts 5"),
            ({"moe_ffn_hidden_size": ABSENT}, "moe_ffn_hidden_size is None, expected"),
        ],
    ),
    (
        CheckpointError,
        SPARSE_LLAMA,
        [
            ({"hidden_act_param": -0.1}, "hidden_act_param is -0.1, expected a number from 0"),
            ({"hidden_act_param": "0.01"}, "hidden_act_param is '0.01', expected a finite number"),
        ],
    ),
    (
        CheckpointError,
        TURBOSPARSE_MISTRAL,
        [
            ({"sliding_window": 0}, "sliding_window is 0, expected"),
            ({"sliding_window": "4096"}, "sliding_window is '4096', expected"),
        ],
    ),
    (
        CheckpointError,
        TURBOSPARSE_MIXTRAL,
        [
            ({"hidden_act": ABSENT}, "hidden_act is None, expected a string"),
            ({"num_local_experts": 4}, "has unknown tensors layers.0.mlp.experts.4.down_proj"),
            ({"num_local_experts": 6}, "lacks tensors layers.0.mlp.experts.5.down_proj"),
        ],
    ),
    (
        UnsupportedModel,
        LLAMA,
        [
            ({"model_type": ABSENT}, "model_type '' is not supported (supported: arcee, bamboo,"),
            ({"model_type": "falcon"}, "model_type 'falcon' is not supported"),
            ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
            ({"hidden_act": "xielu"}, "hidden_act 'xielu' of model_type 'llama' is not known (known: fatrelu,"),
            ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
            (
                {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
                "rope_scaling: rope_type 'dynamic' is not supported",
            ),
            (
                {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
                "rope_parameters: full_attention: settings by layer type",
            ),
        ],
    ),
    (
        UnsupportedModel,
        OPT,
        [
            ({"word_embed_proj_dim": 18}, "word_embed_proj_dim other than hidden_size"),
            *(
                ({key: False}, f"{key} false is not supported")
                for key in ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine")
            ),
            ({"_remove_final_layer_norm": True}, "_remove_final_layer_norm true is not supported"),
            ({"activation_function": "swish"}, "'swish' of model_type 'opt' is not known (known: gelu, relu)"),
        ],
    ),
    (
        UnsupportedModel,
        TURBOSPARSE_MISTRAL,
        [
            ({"hidden_act": "silu"}, "hidden_act 'silu' of model_type 'bamboo'"),
        ],
    ),
]


def changed(config, changes):
    return {key: value for key, value in (config | changes).items() if value is not ABSENT}


@pytest.mark.parametrize(
    ("error", "config", "changes", "part"),
    [
        pytest.param(error, config, changes, part, id=f"{config['model_type']}-{next(iter(changes))}-{idx}")
        for error, config, faults in WRONG_KEYS
        for idx, (changes, part) in enumerate(faults)
    ],
)
def test_a_wrong_key_is_refused_by_its_name(tmp_path, error, config, changes, part):
    folder = write_folder(tmp_path / "model", changed(config, changes), tensors_of(config))
    message = refusal(folder, error)
    assert part in message
    if "tensor" not in part and "has shape" not in part:
        assert message.startswith(str(folder / "config.json"))


@pytest.mark.parametrize("config", [LLAMA, QWEN2, TURBOSPARSE_MISTRAL, TURBOSPARSE_MIXTRAL, SPARSE_LLAMA, SMALLTHINKER])
def test_the_same_folders_open_without_the_fault(tmp_path, config):
    assert open_checkpoint(write_folder(tmp_path / "model", config, tensors_of(config))).num_parameters() > 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("drelux", "--ffn-activation 'drelux' is not one of silu_glu"),
        ("fatrelu:x", "--ffn-activation 'fatrelu:x'"),
        ("fatrelu:-1", "--ffn-activation 'fatrelu:-1'"),
        ("fatrelu:inf", "--ffn-activation 'fatrelu:inf'"),
        ("drelu:0.5", "--ffn-activation 'drelu:0.5'"),
        ("relu2", "--ffn-activation relu2: llama has a gate_proj, relu2 needs none"),
    ],
)
def test_an_override_that_cannot_be_is_a_usage_error(tmp_path, text, part):
    folder = write_folder(tmp_path / "model", LLAMA, dense_tensors())
    with pytest.raises(UsageError) as caught:
        open_checkpoint(folder, ffn_activation=text)
    assert part in str(caught.value)


def test_an_override_of_an_ungated_family_needs_an_ungated_activation(tmp_path):
    folder = write_folder(tmp_path / "model", OPT, dense_tensors())
    with pytest.raises(UsageError, match="opt has no gate_proj, drelu needs one"):
        open_checkpoint(folder, ffn_activation="drelu")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not JSON"),
        ("[1]", "is a JSON list, expected an object"),
        ('{"model_type": "llama", "model_type": "opt"}', "'model_type' twice"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "NaN is no JSON number"),
    ],
)
def test_a_config_that_is_no_object_is_refused(tmp_path, text, part):
    folder = write_folder(tmp_path / "model", LLAMA, dense_tensors())
    (folder / "config.json").write_text(text)
    assert part in refusal(folder, CheckpointError)


def test_a_folder_without_config_is_refused(tmp_path):
    folder = write_folder(tmp_path / "model", LLAMA, dense_tensors())
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder, CheckpointError)


@pytest.mark.parametrize(
    ("model_type", "key", "absent"),
    [
        ("mistral", "sliding_windows", (4096,) * 3),
        ("mixtral", "norm_eps", 1e-5),
        ("arcee", "norm_eps", 1e-5),
        ("llama", "norm_eps", 1e-6),
    ],
)
def test_absent_keys_have_the_defaults_of_transformers(model_type, key, absent):
    values = LLAMA | {"model_type": model_type, "hidden_act": "relu2" if model_type == "arcee" else "silu"}
    values |= {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    for name in ("rms_norm_eps", "sliding_window", "rope_theta"):
        values.pop(name, None)
    config = parse_config(RawConfig(json.loads(json.dumps(values)), "config.json"))
    assert getattr(config, key) == absent
    assert config.rope is not None
    assert config.rope.theta == (1e6 if model_type == "mixtral" else 1e4)
