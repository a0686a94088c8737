"""What training and comparing take of memory beside the model, so that --ram is kept: worked out before they begin."""

from __future__ import annotations

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.training import BATCH_SIZE, MOST_VALIDATED
from hybrid_runtime.config import ModelConfig

COPIED_SAMPLES = 2  # as they are read, and split into training and validation
WEIGHT_COPIES = 10  # weights, gradients, two moments, what rounding holds at once, the best so far
CURVE_BYTES = 24  # for each validated neuron and token: logit, which fired, their order, sums along it
BATCH_BYTES = 16  # for each neuron of a batch: logits, gradients, targets, bits
GATE_BYTES = 24  # for each weight of a gate: in float32 and float64, times the inputs' factor, in parts


def sample_row_bytes(config: ModelConfig) -> int:
    """Of one token in one layer's sample: its input in float16, its experts, a bit for each of their neurons."""
    slots = max(1, config.num_experts_per_tok)
    return 2 * config.hidden_size + slots * (2 + -(-config.intermediate_size // 8))


def validated_tokens(config: ModelConfig, num_samples: int) -> int:
    """As many as a layer is judged on: a tenth, or fewer where that would be too many neurons."""
    slots = max(1, config.num_experts_per_tok)
    return min(num_samples // 10, MOST_VALIDATED // (slots * config.intermediate_size))


def training_bytes(config: ModelConfig, num_samples: int, largest_rank: int) -> int:
    """Of one layer, the widest: layers are trained one after the other. Measured runs stay below (tests)."""
    slots, experts = max(1, config.num_experts_per_tok), max(1, config.num_experts)
    weights = 4 * largest_rank * (config.hidden_size + experts * config.intermediate_size)
    validated = validated_tokens(config, num_samples) * slots * config.intermediate_size
    batch = BATCH_SIZE * (slots * config.intermediate_size * BATCH_BYTES + 8 * config.hidden_size)
    return (
        COPIED_SAMPLES * num_samples * sample_row_bytes(config)
        + WEIGHT_COPIES * weights
        + CURVE_BYTES * validated
        + batch
    )


def comparing_bytes(config: ModelConfig, num_samples: int) -> int:
    """Of the costliest kinds: every gate at 4 bits, and one gate at a time in pieces."""
    experts, gate = max(1, config.num_experts), config.intermediate_size * config.hidden_size
    row = RowFormat("q4", 32).row_bytes(config.hidden_size)
    sketches = config.num_hidden_layers * experts * config.intermediate_size * row
    pieces = GATE_BYTES * gate + 3 * 8 * config.hidden_size**2
    sample = COPIED_SAMPLES * num_samples * sample_row_bytes(config)
    return sketches + pieces + sample + CURVE_BYTES * MOST_VALIDATED
