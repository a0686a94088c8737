"""Decodes with the default model for ever, its neurons in all three tiers; says "ready" before, and what grows."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, sys.argv[1])  # the folder of tests

import torch

from hybrid_kernels.team import Team
from hybrid_runtime.machine import current_rss_bytes
from hybrid_runtime.model.decoder import Decoder, choose_predictor_mode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.shipped import DEFAULT_MODEL, SHIPPED_MODELS
from hybrid_runtime.store.reader import open_store

NUM_POSITIONS = 512
WARM_TOKENS = 500


def main() -> None:
    import tiered_models  # noqa: PLC0415  # of the folder that was named

    store = open_store(SHIPPED_MODELS[DEFAULT_MODEL])
    weights = tiered_models.spread(store, 3, merges=("output",))
    config = store.manifest.config
    decoder = Decoder(config, weights, choose_predictor_mode(config, None), Team(2))
    cache = KvCache(config, NUM_POSITIONS, "f16")
    most = int(sys.argv[2])
    tokens = torch.randint(0, config.vocab_size, (1 << 14,), generator=torch.Generator().manual_seed(1))
    print("ready", flush=True)
    count = before = 0
    while count < most or most == 0:
        if cache.length == NUM_POSITIONS:
            cache.truncate(0)
        decoder.forward(tokens[count % len(tokens)].view(1), cache)
        count += 1
        if count == WARM_TOKENS:
            before = current_rss_bytes()
    print(before, current_rss_bytes(), weights.tiering.cache.counts().disk_misses, flush=True)


main()
