"""Predicted against measured: seconds of a decoded token, and the peak of memory, for three shapes.

    python benchmarks/decode_prediction.py /tmp/shapes

The folder keeps the synthetic stores (3.5 GB). Rows that a token reads are counted on other tokens than those timed.
Prediction and measurement take turns; medians count. The last line is JSON, also written under benchmarks/results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as all programs set it: torch's threads would wait awake

import torch

from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.benchmarking.speed_test import SpeedTest, measure
from hybrid_runtime.engine import LoadOptions, OpenModel, open_model
from hybrid_runtime.machine import describe_machine, peak_rss_bytes, reset_peak_rss
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.placement.decode_time import DecodeConditions, predict_decode_time
from hybrid_runtime.progress import console_progress
from hybrid_runtime.speeds.machine_speeds import machine_speeds
from hybrid_runtime.stores import ModelRequest
from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic

NUM_TOKENS = 48
COUNTED_TOKENS = 24
ROUNDS = 3
SHAPES = {
    "tinystories-moe": None,
    "turbosparse-mistral": SyntheticRequest("turbosparse-mistral", scale=0.5),
    "turbosparse-mixtral": SyntheticRequest("turbosparse-mixtral", num_layers=3),
}


@dataclass(frozen=True)
class Row:
    shape: str
    threads: int
    predicted_ms: float
    measured_ms: float
    predicted_bytes: int
    measured_bytes: int
    predicted_parts_ms: dict[str, float]
    measured_parts_ms: dict[str, float]

    @property
    def time_ratio(self) -> float:
        return self.predicted_ms / self.measured_ms

    @property
    def memory_ratio(self) -> float:
        return self.predicted_bytes / self.measured_bytes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="only these")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    machine, rows = describe_machine(), []
    for name in options.shape or SHAPES:
        request = SHAPES[name]
        if request is not None:
            make_synthetic(request, options.folder / name, console_progress())
        rows.append(compare(name if request is None else str(options.folder / name), name, options.folder))
        print_row(rows[-1])
        gc.collect()
    result = {
        "benchmark": "decode_prediction",
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": asdict(machine),
        "rows": [asdict(row) | {"time_ratio": row.time_ratio, "memory_ratio": row.memory_ratio} for row in rows],
    }
    options.results.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    (options.results / f"decode_prediction-{stamp}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def compare(model: str, name: str, folder: Path) -> Row:
    opened = open_model(
        ModelRequest(model), LoadOptions(num_positions=128, say=lambda line: print(line, file=sys.stderr)),
        needs_tokenizer=False,
    )  # fmt: skip
    reset_peak_rss()
    sequence = opened.load_sequence()
    decoder, cache = sequence.decoder, sequence.cache
    conditions = conditions_of(opened, decoder, cache)
    cache.truncate(0)
    decoder.forward(torch.zeros(100, dtype=torch.int64), cache)  # a prompt, which takes the most memory
    peak_bytes = peak_rss_bytes()  # before measuring the machine, which takes memory of its own
    manifest = opened.store.manifest
    predictions, measured, parts = [], [], []
    test = SpeedTest(0, NUM_TOKENS, 0)
    for _ in range(ROUNDS):
        speeds = machine_speeds(
            describe_machine(), manifest.quantization.weights, opened.num_threads, folder / "speeds",
            lambda line: print(line, file=sys.stderr), measures_again=True,
        )  # fmt: skip
        predictions.append(predict_decode_time(manifest, speeds, conditions))
        found = measure(decoder, cache, test, repetitions=3, warms_up=True)
        measured.append(1 / statistics.median(found.speeds))
        parts.append(parts_of(decoder, cache))
    predicted = sorted(predictions, key=lambda each: each.total_s)[ROUNDS // 2]
    return Row(
        name,
        opened.num_threads,
        1e3 * predicted.total_s,
        1e3 * statistics.median(measured),
        opened.memory_plan.expected,
        peak_bytes,
        {part: 1e3 * seconds for part, seconds in asdict(predicted).items()},
        {part: 1e3 * statistics.median(each[part] for each in parts) for part in parts[0]},
    )


def conditions_of(opened: OpenModel, decoder: Decoder, cache: KvCache) -> DecodeConditions:
    """Rows of tokens that are not timed: another seed's."""
    generator = torch.Generator().manual_seed(77)
    cache.truncate(0)
    tokens = torch.randint(0, decoder.config.vocab_size, (COUNTED_TOKENS,), generator=generator)
    decoder.forward(tokens[:1], cache)
    decoder.counters.reset()
    for token in tokens[1:]:
        decoder.forward(token.view(1), cache)
    counters, count = decoder.counters, len(tokens) - 1
    rows = NeuronRows(counters.gate_rows / count, counters.up_rows / count, counters.down_rows / count)
    return DecodeConditions(rows, not decoder.masks, decoder.masks, (NUM_TOKENS + 1) / 2, opened.kv_dtype)


def parts_of(decoder: Decoder, cache: KvCache) -> dict[str, float]:
    """Seconds of a token by label, as the kernels' counters have it: to see which part a prediction misses."""
    program = decoder.program_of(cache)
    ticks = program.ticks_by_label()
    total = sum(ticks.values())
    return {label: count / total for label, count in ticks.items()}


def print_row(row: Row) -> None:
    print(
        f"{row.shape:22} {row.threads} threads: predicted {row.predicted_ms:8.3f} ms, measured {row.measured_ms:8.3f} "
        f"({row.time_ratio:.3f}); memory predicted {row.predicted_bytes / 2**20:7.0f} MiB, measured "
        f"{row.measured_bytes / 2**20:7.0f} ({row.memory_ratio:.3f})",
        flush=True,
    )
    shares = {part: share * row.measured_ms / 1e3 for part, share in row.measured_parts_ms.items()}
    print("   predicted ms: " + ", ".join(f"{part} {ms:.3f}" for part, ms in row.predicted_parts_ms.items()))
    print("   measured ms:  " + ", ".join(f"{part} {ms:.3f}" for part, ms in shares.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
