"""The description of a run: what it refuses, what it calls a difference, and that JSON changes nothing."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hybrid_runtime.errors import UsageError
from hybrid_tools.training.recipe import Optimisation, Recipe, Shape, activation_of


def recipe(**changes):
    shape = Shape(num_experts=4)
    config = dataclasses.replace(
        shape.config(activation_of("fatrelu", 0.1), 300, None, 2), sliding_windows=(512,) * 5, eos_token_ids=(2, 7)
    )
    values = {
        "config": config,
        "optimisation": Optimisation(total_tokens=8192, learning_rate=0.1 + 0.2),
        "seed": 1,
        "source": "",
        "corpus": "c",
        "vocabulary": "v",
        "num_threads": 1,
        "device": "cpu",
        "torch_version": "2",
    }
    return Recipe(**values | changes)


def test_a_recipe_that_went_through_json_is_the_same():
    assert recipe().differences(json.loads(json.dumps(recipe().to_json()))) == []


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "seed: 1, now 2"),
        ({"device": "cuda"}, "device: 'cpu', now 'cuda'"),
        ({"num_threads": 2}, "num_threads: 1, now 2"),
        ({"corpus": "d"}, "corpus: 'c', now 'd'"),
        ({"optimisation": Optimisation(8192, learning_rate=0.3)}, "optimisation.learning_rate: 0.30000000000000004, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_difference_is_named_with_both_values(change, difference):
    (found,) = recipe(**change).differences(json.loads(json.dumps(recipe().to_json())))
    assert found.startswith(difference)


def test_differences_inside_the_shape_and_missing_keys_are_named():
    old = json.loads(json.dumps(recipe().to_json()))
    old["config"]["activation"]["threshold"] = 0.2
    old["config"]["eos_token_ids"] = [2]
    del old["optimisation"]["clip"]
    assert recipe().differences(old) == [
        "config.activation.threshold: 0.2, now 0.1",
        "config.eos_token_ids: [2], now [2, 7]",
        "optimisation.clip: None, now 1.0",
    ]


@pytest.mark.parametrize(
    ("num_experts", "activation", "family"),
    [(0, "swiglu", "llama"), (0, "drelu", "bamboo"), (4, "relu", "mixtral"), (4, "drelu", "turbosparsemixtral")],
)
def test_shape_and_activation_decide_the_family(num_experts, activation, family):
    config = Shape(num_experts=num_experts).config(activation_of(activation, 0.0), 300, 1, 2)
    assert config.family == family
    assert config.num_experts_per_tok == (2 if num_experts else 0)
    assert config.head_dim == 32


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"total_tokens": 0}, "--tokens 0"),
        ({"learning_rate": float("inf")}, "--lr inf"),
        ({"final_learning_rate": 1.5}, "--final-lr 1.5"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1"),
        ({"clip": 0.0}, "--clip 0.0"),
        (
            {"batch_tokens": 100, "seq_len": 64, "micro_batch": 1},
            "--batch-tokens 100 is not a multiple of --seq-len 64",
        ),
        ({"micro_batch": 5}, "--micro-batch 5 does not divide the 16 sequences"),
        ({"beta2": 1.0}, "beta2 1.0"),
        ({"dtype": "f16"}, "--dtype f16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_makes_no_sense_is_named_by_its_flag(changes, flag):
    with pytest.raises(UsageError, match=flag):
        Optimisation(**{"total_tokens": 4096} | changes)
