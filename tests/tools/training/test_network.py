"""The network with gradients: it learns as transformers does step by step, and computes what the engine computes."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from hybrid_kernels.activation import Activation, activate
from hybrid_runtime.config import RopeConfig
from hybrid_runtime.errors import UsageError
from hybrid_tools.training.initial import random_weights, with_activation
from hybrid_tools.training.network import forward, refuse_untrainable
from hybrid_tools.training.published import write_model
from hybrid_tools.training.recipe import Optimisation, Shape, activation_of
from hybrid_tools.training.schedule import learning_rate
from hybrid_tools.training.trainer import Trainer

VOCABULARY = 200
NUM_STEPS = 20
BALANCE = 0.02
MOST_DIFFERENT = 1e-3  # the bound; what is seen is below 1e-5


def shape(num_experts, **sizes):
    return Shape(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=num_experts,
        **sizes,
    )


class RandomBatches:
    """Another batch for every step, without a corpus."""

    def __init__(self, num_sequences, seq_len):
        self.size = (num_sequences, seq_len + 1)

    def step(self, step_idx):
        return np.random.default_rng(step_idx).integers(0, VOCABULARY, self.size).astype("uint32")


def transformers_model(folder, config, weights):
    write_model(folder, config, weights, folder, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if config.num_experts:
        model.config.output_router_logits = True
        model.router_aux_loss_coef = BALANCE
    return model.train()


@pytest.mark.parametrize(
    ("num_experts", "micro_batch"), [(0, 4), (0, 1), (4, 4)], ids=["llama", "llama-accumulated", "mixtral"]
)
def test_loss_is_that_of_a_transformers_loop_for_20_steps(num_experts, micro_batch, tmp_path):
    config = shape(num_experts).config(activation_of("swiglu", 0.0), VOCABULARY, 1, 2)
    optimisation = Optimisation(
        total_tokens=NUM_STEPS * 128, batch_tokens=128, seq_len=32, micro_batch=micro_batch, balance=BALANCE
    )
    weights = random_weights(config, seed=3)
    model = transformers_model(tmp_path, config, weights)
    batches = RandomBatches(4, 32)
    trainer = Trainer(config, weights, optimisation, batches, torch.device("cpu"))
    optimiser = torch.optim.AdamW(
        [
            {"params": [each for each in model.parameters() if each.ndim > 1], "weight_decay": 0.1},
            {"params": [each for each in model.parameters() if each.ndim == 1], "weight_decay": 0.0},
        ],
        lr=2e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step_idx in range(NUM_STEPS):
        tokens = torch.from_numpy(batches.step(step_idx).astype("int64"))
        output = model(input_ids=tokens[:, :-1])
        loss = functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + (BALANCE * output.aux_loss if num_experts else 0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(optimisation, step_idx)
        optimiser.step()
        optimiser.zero_grad()
        result = trainer.step()
        assert abs(result.loss - loss.item()) <= MOST_DIFFERENT, step_idx
        if num_experts:
            assert abs(result.balance - output.aux_loss.item()) <= MOST_DIFFERENT, step_idx
        losses.append(loss.item())
    assert max(losses) - min(losses) > 0.01  # else equality would say little


@pytest.mark.parametrize("num_experts", [0, 4], ids=["llama", "mixtral"])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_transformers_gives_the_same_logits(activation, num_experts, tmp_path):
    config = shape(num_experts).config(activation_of(activation, 0.0), VOCABULARY, 1, 2)
    weights = {name: weight * (8 if weight.ndim > 1 else 1) for name, weight in random_weights(config, 5).items()}
    tokens = torch.from_numpy(RandomBatches(3, 20).step(0).astype("int64"))
    with torch.no_grad():
        theirs = transformers_model(tmp_path, config, weights).eval()(tokens).logits
        ours = forward(config, weights, tokens).logits
    assert theirs.std() > 0.3
    assert (theirs - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["swiglu", "relu", "drelu", "fatrelu"])
def test_activations_are_what_their_names_say(kind):
    config = shape(0).config(activation_of(kind, 0.1 if kind == "fatrelu" else 0.0), VOCABULARY, 1, 2)
    weights = {name: weight * (8 if weight.ndim > 1 else 1) for name, weight in random_weights(config, 5).items()}
    gates = {
        "swiglu": lambda gate, up: gate * gate.sigmoid() * up,
        "relu": lambda gate, up: gate * (gate > 0) * up,
        "drelu": lambda gate, up: gate * (gate > 0) * up * (up > 0),
        "fatrelu": lambda gate, up: gate * (gate > 0.1) * up,
    }
    seen = []
    tokens = torch.from_numpy(RandomBatches(2, 12).step(0).astype("int64"))

    def look(layer_idx, expert_idx, hidden):
        seen.append(hidden)
        return hidden

    forward(config, weights, tokens, look)
    silent = forward(config, weights, tokens, lambda layer_idx, expert_idx, hidden: torch.zeros_like(hidden)).logits
    assert not torch.allclose(silent, forward(config, weights, tokens).logits)  # what is replaced is what counts
    x = torch.randn(7, 64)
    gate, up = x @ weights["layers.0.mlp.gate_proj"].T, x @ weights["layers.0.mlp.up_proj"].T
    assert torch.allclose(activate(config.activation, gate, up), gates[kind](gate, up), atol=1e-6)
    assert ((seen[0] == 0).float().mean() > 0.2) == (kind != "swiglu")


def test_a_token_never_sees_those_after_it():
    config = shape(4).config(activation_of("drelu", 0.0), VOCABULARY, 1, 2)
    weights = random_weights(config, 5)
    tokens = torch.from_numpy(RandomBatches(1, 20).step(0).astype("int64"))
    changed = tokens.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % VOCABULARY
    first, second = (forward(config, weights, each).logits for each in (tokens, changed))
    assert torch.allclose(first[0, :12], second[0, :12], atol=1e-6)
    assert not torch.allclose(first[0, 12:], second[0, 12:], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"norm": "layer"}, "layer norms"),
        ({"qkv_bias": True}, "biases"),
        ({"rope": None}, "learned positions"),
        ({"activation": Activation("relu")}, "ungated"),
        ({"router_input": "layer_input"}, "SmallThinker"),
        ({"sliding_windows": (16, None, None)}, "sliding window shorter than --seq-len 32"),
    ],
    ids=["layer-norm", "bias", "positions", "ungated", "router", "window"],
)
def test_what_is_not_computed_is_refused_by_name(change, match):
    config = shape(4).config(activation_of("swiglu", 0.0), VOCABULARY, 1, 2)
    refuse_untrainable(config, 32)
    with pytest.raises(UsageError, match=match):
        refuse_untrainable(dataclasses.replace(config, **change), 32)


def test_scaled_positions_train_but_have_no_published_form(tmp_path):
    config = shape(0).config(activation_of("drelu", 0.0), VOCABULARY, 1, 2)
    scaled = dataclasses.replace(config, rope=RopeConfig(1e4, "linear", 4.0))
    with pytest.raises(UsageError, match="no published form"):
        write_model(tmp_path, scaled, random_weights(scaled, 1), tmp_path, {})


def test_twins_begin_with_the_same_numbers_and_seeds_differ():
    drelu, swiglu = (shape(4).config(activation_of(kind, 0.0), VOCABULARY, 1, 2) for kind in ("drelu", "swiglu"))
    first, second, third = random_weights(drelu, 1), random_weights(swiglu, 1), random_weights(swiglu, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head"], third["lm_head"])
    assert first["norm"].eq(1).all()
    assert first["layers.0.mlp.experts.0.up_proj"].std() == pytest.approx(0.02, rel=0.05)
    assert first["layers.0.mlp.experts.0.down_proj"].std() == pytest.approx(0.02 / 6**0.5, rel=0.05)
    assert with_activation(swiglu, Activation("drelu")) == drelu
