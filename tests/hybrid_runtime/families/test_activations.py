"""Which activation a checkpoint computes: never guessed where two models share their words."""

import pytest

from hybrid_kernels.activation import Activation
from hybrid_runtime.errors import CheckpointError, UnsupportedModel, UsageError
from hybrid_runtime.families.activations import find_activation, parse_activation, refuse_silent_guess
from hybrid_runtime.families.raw_config import RawConfig


def found(model_type, hidden_act, repo_id="", override=None, **values):
    return find_activation(RawConfig(values, "config.json"), model_type, hidden_act, repo_id, override)


@pytest.mark.parametrize(
    ("model_type", "hidden_act", "repo_id", "activation"),
    [
        ("llama", "relu", "", Activation("relu_glu")),
        ("bamboo", "relu", "", Activation("drelu")),
        ("llama_sparse_relu", "silu", "", Activation("relu_glu")),
        ("qwen2", "relu", "Tiiny/SparseQwen2-7B", Activation("drelu")),
        ("qwen2", "relu", "PowerInfer/SparseQwen2-7B", Activation("drelu")),
        ("llama", "relu", "openbmb/MiniCPM-S-1B-sft-llama-format", Activation("fatrelu", 0.03)),
        # a folder's name alone decides nothing: the keys beside it must be that model's
        ("mistral", "silu", "SparseQwen2-7B", Activation("silu_glu")),
        ("llama", "silu", "SparseQwen2-7B", Activation("silu_glu")),
    ],
)
def test_the_three_keys_decide_together(model_type, hidden_act, repo_id, activation):
    assert found(model_type, hidden_act, repo_id) == activation


def test_what_two_models_share_is_refused_until_the_caller_decides():
    with pytest.raises(UnsupportedModel, match=r"qwen2.*can mean drelu .* or relu_glu.*--ffn-activation"):
        found("qwen2", "relu")
    assert found("qwen2", "relu", override="relu_glu") == Activation("relu_glu")


def test_fatrelu_has_no_threshold_unless_somebody_says_it():
    with pytest.raises(CheckpointError, match="hidden_act_param is None, expected a finite number"):
        found("sparsellama", "fatrelu")
    assert found("sparsellama", "fatrelu", hidden_act_param=0.01) == Activation("fatrelu", 0.01)
    with pytest.raises(UsageError, match=r"fatrelu needs its threshold, as in fatrelu:0\.01"):
        parse_activation("fatrelu")
    assert parse_activation("fatrelu:0") == Activation("fatrelu", 0.0)


@pytest.mark.parametrize("name", ["ReluLLaMA-7B", "prosparse-llama-2-7b.Q4_K_M.gguf", "SparseQwen2 7B", "bamboo-7b"])
def test_a_sparse_models_name_on_a_file_that_does_not_record_its_activation_is_refused(name):
    with pytest.raises(UnsupportedModel, match="names a model with a sparse activation"):
        refuse_silent_guess("x.gguf", ("harmless", None, name), None)
    refuse_silent_guess("x.gguf", (name,), "relu_glu")


@pytest.mark.parametrize("name", ["Meta-Llama-3-8B", "Qwen2.5-7B-Instruct", "Mistral 7B v0.3", None, 7])
def test_an_ordinary_name_is_no_sparse_models(name):
    refuse_silent_guess("x.gguf", (name,), None)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_local_experts"])
def test_counts_that_are_looped_over_are_bounded(key):
    assert RawConfig({key: 4096}, "f").integer(key) == 4096
    with pytest.raises(CheckpointError, match=f"f: {key} is 4097, expected a whole number from 1 to 4096"):
        RawConfig({key: 4097}, "f").integer(key)


def test_a_number_that_no_float_holds_is_refused():
    raw = RawConfig({"rope_theta": 10**400, "long_factor": [1.0, 10**400]}, "f")
    with pytest.raises(CheckpointError, match=r"f: rope_theta is 1000.*\.\.\., expected a finite number"):
        raw.number("rope_theta")
    with pytest.raises(CheckpointError, match=r"f: long_factor is .* expected a list of finite numbers"):
        raw.numbers("long_factor")
