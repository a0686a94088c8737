"""What computing with tiers takes of RAM beside the tiers themselves."""

from __future__ import annotations

from dataclasses import replace

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.budget import MemoryPlan
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.placement.starts import least_cache_bytes
from hybrid_runtime.tiers.bundles import GATHERED_BYTES, READ_BYTES
from hybrid_runtime.tiers.disk_cache import MOST_READ_BYTES, NUM_BUFFERS
from hybrid_runtime.tiers.load import CHUNK_BYTES, READ_THREADS

HOME_BYTES = 16  # of a neuron: its home, and its tier while the plan is read
GATHERED_COPIES = 3  # a block of bundles, the one before it, and one on its way


def bundle_bytes(config: ModelConfig, row_format: RowFormat) -> int:
    """Of one neuron."""
    return row_format.row_bytes(config.hidden_size) * (3 if config.activation.is_gated else 2)


def num_neurons(config: ModelConfig) -> int:
    """Of all layers and experts."""
    return config.num_hidden_layers * max(1, config.num_experts) * config.intermediate_size


def tier_working_bytes(config: ModelConfig, row_format: RowFormat) -> int:
    """Tables of homes, buffers of reads, and what loading or a batch takes, whichever is more."""
    network = config.intermediate_size * bundle_bytes(config, row_format)
    batch = GATHERED_COPIES * min(GATHERED_BYTES, network) + min(READ_BYTES, network)
    loading = READ_THREADS * min(CHUNK_BYTES, network)
    buffers = NUM_BUFFERS * (MOST_READ_BYTES + (8 << 10))
    return num_neurons(config) * HOME_BYTES + buffers + max(loading, batch)


def least_memory(plan: MemoryPlan, config: ModelConfig, row_format: RowFormat) -> MemoryPlan:
    """The same run with all its neurons on disk, which is the least that it can do with. plan: with them in RAM."""
    bundle = bundle_bytes(config, row_format)
    return replace(
        plan,
        weights=plan.weights - num_neurons(config) * bundle + least_cache_bytes(config, bundle),
        workspace=plan.workspace + tier_working_bytes(config, row_format),
    )
