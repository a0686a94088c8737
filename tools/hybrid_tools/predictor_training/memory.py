"""What training and comparing take of memory beside the model, so that --ram is kept: worked out before they begin.

Training holds every layer's packed predictors, and works on one layer at a time, which takes

    COPIED_SAMPLES * its sample + WEIGHT_COPIES * its weights + CURVE_BYTES * what is validated + BATCH_BYTES * a batch

in turn with judging, which counts every layer's firings and holds a batch's named and active sets.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.sketch import MOST_INPUTS
from hybrid_predictors.thresholds import CHUNK
from hybrid_predictors.training import BATCH_SIZE, MOST_VALIDATED
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.profiling.samples import SampleShape
from hybrid_runtime.store.predictor_files import PredictorHeader

SKETCH_ROWS = RowFormat("q4", 32)  # of sign and svd
SVD_RANK_SHARE = 1 / 4  # of hidden_size, where no trained ones say how wide

COPIED_SAMPLES = 2  # as they are read, and mapped or checked
WEIGHT_COPIES = 13  # in float32: weights, gradients, two moments, two best so far; what rounding holds; 12.5 measured
CURVE_BYTES = 16  # for each validated neuron and token: logit, whether it fired, twice the logits of those that did
SORTED_BYTES = 32 * CHUNK  # that are counted at a time: in float64, sorted, with their order
BATCH_BYTES = 24  # for each neuron and token of a batch: logits, targets, gradients, losses; 19 measured
JUDGED_BYTES = 16  # for each neuron and token that is judged: logits, named and active sets, what they have in common
GATE_BYTES = 24  # for each weight of a gate that is sketched: dense, times the inputs' factor, what packing holds
MOMENT_BYTES = 28  # for each pair of inputs: in float32 and float64, its factor in both


def sample_row_bytes(config: ModelConfig) -> int:
    """Of one token in one layer's sample: its input in float16, its experts, a bit for each of their neurons."""
    return SampleShape.of(config).row.itemsize


def validated_tokens(config: ModelConfig, num_samples: int) -> int:
    """As many as a layer is judged on: a tenth, or fewer where that would be too many neurons."""
    return min(round(num_samples / 10), MOST_VALIDATED // (_slots(config) * config.intermediate_size))


def training_bytes(config: ModelConfig, num_samples: int, largest_rank: int, packed_bytes: int) -> int:
    """Beside the model, largest_rank being that of the widest layer, packed_bytes those of all layers' predictors."""
    validated = validated_tokens(config, num_samples)
    of_token = _slots(config) * config.intermediate_size  # neurons
    weights = 4 * largest_rank * (config.hidden_size + max(1, config.num_experts) * config.intermediate_size)
    of_layer = (
        COPIED_SAMPLES * num_samples * sample_row_bytes(config)
        + WEIGHT_COPIES * weights
        + validated * (CURVE_BYTES * of_token + 8 * config.hidden_size)
        + SORTED_BYTES
        + BATCH_SIZE * (BATCH_BYTES * of_token + 8 * config.hidden_size)
    )
    return packed_bytes + max(of_layer, _judging_bytes(config))


def comparing_bytes(
    config: ModelConfig, num_samples: int, kinds: Sequence[str] = (), trained: PredictorHeader | None = None
) -> int:
    """Beside the model, for the costliest of these kinds (none: all), whose predictors are in memory for all layers."""
    neurons = max(1, config.num_experts) * config.intermediate_size
    wide = SKETCH_ROWS.row_bytes(config.hidden_size)
    packed = {
        "mlp": 0 if trained is None else trained.num_bytes,
        "sign": config.num_hidden_layers * neurons * wide,
        "svd": sum(
            max(1, config.num_experts) * rank * wide + neurons * SKETCH_ROWS.row_bytes(rank)
            for rank in svd_ranks(config, trained)
        ),
    }
    sketching = (
        COPIED_SAMPLES * num_samples * sample_row_bytes(config)
        + GATE_BYTES * config.intermediate_size * config.hidden_size
        + MOMENT_BYTES * config.hidden_size**2
        + 3 * 4 * min(num_samples, MOST_INPUTS) * config.hidden_size  # sampled inputs, before and after the norm
        + CURVE_BYTES * MOST_VALIDATED
        + SORTED_BYTES
    )
    judging = _judging_bytes(config)
    takes = {kind: size + max(judging, sketching if kind != "mlp" else 0) for kind, size in packed.items()}
    return max((takes.get(kind, judging) for kind in kinds or packed), default=judging)


def svd_ranks(config: ModelConfig, trained: PredictorHeader | None) -> list[int]:
    """By layer, as wide as the trained ones, if there are any."""
    largest = min(config.hidden_size, config.intermediate_size)
    if trained is not None:
        return [min(layer.rank, largest) for layer in trained.layers]
    return [min(max(1, round(config.hidden_size * SVD_RANK_SHARE)), largest)] * config.num_hidden_layers


def _judging_bytes(config: ModelConfig) -> int:
    experts = max(1, config.num_experts)
    counts = 8 * config.num_hidden_layers * experts * (config.intermediate_size + experts + 3)
    return counts + JUDGED_BYTES * PREFILL_BATCH * config.intermediate_size


def _slots(config: ModelConfig) -> int:
    return max(1, config.num_experts_per_tok) if config.num_experts else 1
