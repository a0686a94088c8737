"""How many neurons the predictors that come with a checkpoint name for one that fires: nobody publishes it."""

from __future__ import annotations

from pathlib import Path

import torch

from hybrid_kernels.linear.reference import linear
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_runtime.store.reader import Store

MOST_LAYERS, MOST_TOKENS, MOST_NEURONS = 4, 64, 1024  # that logits are computed of: enough for a ratio


def measured_named_for_one(store: Store, profile_folder: Path) -> float | None:
    """From some sampled tokens and neurons of some layers' first experts; None where no sampled neuron fired.

    Samples hold what predictors read, and a neuron that is not named does not fire, so it is at least 1.
    """
    config = store.manifest.config
    step = max(1, config.num_hidden_layers // MOST_LAYERS)
    named = fired = 0
    for layer_idx in range(0, config.num_hidden_layers, step):
        ffn = ffn_names(config, layer_idx)[0]
        fc1, fc2 = (_matrix(store, f"{ffn}.predictor.{name}") for name in ("fc1", "fc2"))
        some = fc2.slice_rows(0, min(MOST_NEURONS, fc2.num_rows))
        inputs, active = read_samples(profile_folder, config, layer_idx).of_expert(
            0, config.intermediate_size, MOST_TOKENS
        )
        logits = linear(torch.relu(linear(inputs, fc1)), some)
        named += int((logits > config.predictor_threshold).sum())
        fired += int(active[:, : some.num_rows].sum())
    return max(1.0, named / fired) if fired else None


def _matrix(store: Store, name: str) -> PackedMatrix:
    (part,) = (part for part in store.manifest.parts if any(entry.name == name for entry in part.entries))
    weight = store.read_parts([part], "mmap")[0][name]
    assert isinstance(weight, PackedMatrix)
    return weight
