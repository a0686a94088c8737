"""What computing with tiers takes of RAM beside the tiers themselves."""

from __future__ import annotations

from hybrid_runtime.store.manifest import Manifest
from hybrid_runtime.tiers.bundles import GATHERED_BYTES, READ_BYTES
from hybrid_runtime.tiers.disk_cache import MOST_READ_BYTES, NUM_BUFFERS
from hybrid_runtime.tiers.load import CHUNK_BYTES, READ_THREADS

HOME_BYTES = 16  # of a neuron: its home, and its tier while the plan is read
GATHERED_COPIES = 3  # a block of bundles, the one before it, and one on its way


def tier_working_bytes(manifest: Manifest) -> int:
    """Tables of homes, buffers of reads, and what loading or a batch takes, whichever is more."""
    config = manifest.config
    row_bytes = manifest.quantization.weights.row_bytes(config.hidden_size)
    network = config.intermediate_size * row_bytes * (3 if config.activation.is_gated else 2)
    neurons = config.num_hidden_layers * max(1, config.num_experts) * config.intermediate_size
    batch = GATHERED_COPIES * min(GATHERED_BYTES, network) + min(READ_BYTES, network)
    loading = READ_THREADS * min(CHUNK_BYTES, network)
    return neurons * HOME_BYTES + NUM_BUFFERS * (MOST_READ_BYTES + (8 << 10)) + max(loading, batch)
