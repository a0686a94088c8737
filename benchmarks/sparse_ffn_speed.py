"""The sparse FFN kernels alone, down projection included, against the memory's bandwidth.

    python benchmarks/sparse_ffn_speed.py STORE [--threads 2]

STORE is a sparse one of hybrid-synth's. A token is decoded, which chooses its neurons in every layer; then only the
neurons' operations of that token's program run again, over all layers, which is far more than the caches hold. The
bytes are the rows that the kernels say they read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from hybrid_kernels.bandwidth.op import read_bandwidth
from hybrid_runtime.cli.loading import use_threads
from hybrid_runtime.engine import open_model
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import physical_cores, usable_cores
from hybrid_runtime.stores import ModelRequest

NUM_TOKENS = 20
LABEL = "neurons"


def sparse_ffn_sample(store: Path, num_threads: int) -> dict[str, float]:
    """Median milliseconds of one token's networks, their GB/s, and its share of the bandwidth measured right after."""
    use_threads(num_threads)
    options = LoadOptions(num_positions=NUM_TOKENS + 1, threads=num_threads)
    opened = open_model(ModelRequest(str(store)), options, needs_tokenizer=False)
    sequence = opened.load_sequence()
    decoder, config = sequence.decoder, opened.store.manifest.config
    tokens = torch.randint(0, config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    decoder.forward(tokens[:1], sequence.cache)
    operations = decoder._program(sequence.cache).program.operations  # noqa: SLF001  # only this file takes it apart
    networks = decoder.team.program([operation for operation in operations if operation.label == LABEL])
    row_bytes = opened.store.manifest.quantization.weights.row_bytes(config.hidden_size)
    times, rates = [], []
    for idx in range(1, NUM_TOKENS):
        decoder.forward(tokens[idx : idx + 1], sequence.cache)
        decoder.counters.reset()
        started_s = time.perf_counter()
        decoder.team.run(networks)
        times.append(time.perf_counter() - started_s)
        counters = decoder.counters
        rates.append((counters.gate_rows + counters.up_rows + counters.down_rows) * row_bytes / times[-1] / 1e9)
    achieved_gbs, bandwidth_gbs = statistics.median(rates), read_bandwidth(decoder.team) / 1e9
    return {
        "ms": statistics.median(times) * 1e3,
        "achieved_gbs": achieved_gbs,
        "bandwidth_gbs": bandwidth_gbs,
        "of_bandwidth": achieved_gbs / bandwidth_gbs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--threads", type=int, default=min(physical_cores(), usable_cores()), help="(%(default)s)")
    arguments = parser.parse_args(argv)
    sample = sparse_ffn_sample(arguments.store, arguments.threads)
    print(", ".join(f"{name} {value:.3g}" for name, value in sample.items()))
    print(json.dumps(sample))
    return 0


if __name__ == "__main__":
    sys.exit(main())
