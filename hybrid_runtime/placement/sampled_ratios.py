"""What a profile's sample tells of a token's reads: gates that fire, and neurons named, for one neuron that fires.

Nobody publishes either. Some tokens, neurons and layers are enough for a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_kernels.activation import gate_fires
from hybrid_kernels.linear.reference import linear
from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_runtime.model.weight_specs import ffn_names
from hybrid_runtime.profiling.gate_inputs import gate_inputs
from hybrid_runtime.profiling.profile_file import read_samples
from hybrid_runtime.store.reader import Store

MOST_LAYERS, MOST_TOKENS, MOST_NEURONS = 4, 64, 512


@dataclass(frozen=True, slots=True)
class SampledRatios:
    """gates_for_one: gates that fire for one neuron that fires; named_for_one: neurons that the checkpoint's own
    predictors name. Both at least 1; None: the sample does not say.
    """

    gates_for_one: float | None
    named_for_one: float | None


def sampled_ratios(store: Store, profile_folder: Path) -> SampledRatios:
    """Of some layers' first experts."""
    config = store.manifest.config
    asks_gates = config.activation.kind == "drelu"  # of the others a gate that fires means that the neuron does
    step = max(1, config.num_hidden_layers // MOST_LAYERS)
    gates = named = fired = 0
    knows_gates = True
    for layer_idx in range(0, config.num_hidden_layers, step):
        ffn = ffn_names(config, layer_idx)[0]
        samples = read_samples(profile_folder, config, layer_idx)
        inputs, active = samples.of_expert(0, config.intermediate_size, MOST_TOKENS)
        fired += int(active[:, :MOST_NEURONS].sum())
        if asks_gates:
            read = gate_inputs(store, layer_idx, inputs)
            knows_gates = knows_gates and read is not None
            gates += 0 if read is None else _gates(store, ffn, read)
        if config.predictor_input is not None:
            named += _named(store, ffn, inputs)
    return SampledRatios(
        _ratio(gates, fired if knows_gates else 0) if asks_gates else 1.0,
        _ratio(named, fired) if config.predictor_input is not None else None,
    )


def _ratio(count: int, fired: int) -> float | None:
    return max(1.0, count / fired) if fired else None


def _gates(store: Store, ffn: str, inputs: torch.Tensor) -> int:
    """inputs: float32 [n, H], what gates read."""
    bundles = store.weight(f"{ffn}.bundles")
    assert isinstance(bundles, Bundles)
    some = bundles.take(slice(0, MOST_NEURONS))
    return int(gate_fires(store.manifest.config.activation, linear(inputs, some.gate_proj, some.gate_bias)).sum())


def _named(store: Store, ffn: str, inputs: torch.Tensor) -> int:
    """inputs: float32 [n, H], what predictors read."""
    fc1, fc2 = store.weight(f"{ffn}.predictor.fc1"), store.weight(f"{ffn}.predictor.fc2")
    assert isinstance(fc1, PackedMatrix)
    assert isinstance(fc2, PackedMatrix)
    logits = linear(torch.relu(linear(inputs, fc1)), fc2.slice_rows(0, min(MOST_NEURONS, fc2.num_rows)))
    return int((logits > store.manifest.config.predictor_threshold).sum())
