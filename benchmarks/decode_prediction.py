"""Predicted against measured: seconds of a decoded token, and the peak of memory, for three shapes.

    python benchmarks/decode_prediction.py /tmp/shapes

The folder keeps the synthetic stores (5.5 GB). Rows that a token reads are counted on other tokens than those timed.
Measuring the machine and decoding take turns, a second or two each, because others use its memory too; the medians of
all rounds count, and every round is in the results. Takes some four minutes. The last line is JSON, also written under
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as all programs set it: torch's threads would wait awake

import torch

from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.benchmarking.speed_test import SpeedTest, measure
from hybrid_runtime.engine import LoadOptions, OpenModel, open_model
from hybrid_runtime.machine import describe_machine, peak_rss_bytes, reset_peak_rss
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.placement.decode_time import DecodeConditions, DecodeTime, predict_decode_time
from hybrid_runtime.progress import console_progress
from hybrid_runtime.speeds.kernel_speeds import KernelCalibration
from hybrid_runtime.speeds.machine_speeds import machine_speeds
from hybrid_runtime.stores import ModelRequest
from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic

NUM_TOKENS = 64
COUNTED_TOKENS = 24
ROUNDS = 9
CALIBRATION_ROUNDS = 5  # of each of its models, a round
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
    predicted_rounds_ms: list[float]
    measured_rounds_ms: list[float]

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
    machine, names = describe_machine(), options.shape or list(SHAPES)
    rows = (
        [row_of(names[0], options.folder)] if len(names) == 1 else [row_apart(name, options.folder) for name in names]
    )
    result = {
        "benchmark": "decode_prediction",
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": asdict(machine),
        "rows": rows,
    }
    options.results.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    (options.results / f"decode_prediction-{stamp}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def row_apart(name: str, folder: Path) -> dict[str, Any]:
    """One shape in a process of its own, so that its memory has nothing of the one before."""
    with tempfile.TemporaryDirectory() as results:
        command = [sys.executable, __file__, str(folder), "--shape", name, "--results", results]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    *lines, last = output.splitlines()
    print("\n".join(lines), flush=True)
    (row,) = json.loads(last)["rows"]
    return row


def row_of(name: str, folder: Path) -> dict[str, Any]:
    request = SHAPES[name]
    if request is not None:
        make_synthetic(request, folder / name, console_progress())
    row = compare(name if request is None else str(folder / name), name, folder)
    print_row(row)
    return asdict(row) | {"time_ratio": row.time_ratio, "memory_ratio": row.memory_ratio}


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
    predictions, measured, parts = take_turns(opened, decoder, cache, conditions, folder / "speeds")
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
        [1e3 * each.total_s for each in predictions],
        [1e3 * seconds for seconds in measured],
    )


def take_turns(
    opened: OpenModel, decoder: Decoder, cache: KvCache, conditions: DecodeConditions, cache_dir: Path
) -> tuple[list[DecodeTime], list[float], list[dict[str, float]]]:
    """Predictions, measured seconds of a token, and the measured seconds by label, of every round."""
    manifest, test = opened.store.manifest, SpeedTest(0, NUM_TOKENS, 0)
    row_format = manifest.quantization.weights
    speeds = machine_speeds(
        describe_machine(), row_format, opened.num_threads, cache_dir, lambda line: print(line, file=sys.stderr)
    )
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        calibration = KernelCalibration(row_format, decoder.team, Path(scratch))
    predictions, measured, parts = [], [], []
    for _ in range(ROUNDS):
        now = replace(speeds, kernels=(calibration.measure(CALIBRATION_ROUNDS),))
        predictions.append(predict_decode_time(manifest, now, conditions))
        program = decoder.program_of(cache)
        program.reset_ticks()
        found = measure(decoder, cache, test, repetitions=1, warms_up=False)
        measured.append(1 / found.speeds[0])
        ticks = program.ticks_by_label()
        per_tick = found.samples[0].kernel_s / NUM_TOKENS / sum(ticks.values())
        parts.append({label: count * per_tick for label, count in ticks.items()})
    return predictions, measured, parts


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


def print_row(row: Row) -> None:
    print(
        f"{row.shape:22} {row.threads} threads: predicted {row.predicted_ms:8.3f} ms, measured {row.measured_ms:8.3f} "
        f"({row.time_ratio:.3f}); memory predicted {row.predicted_bytes / 2**20:7.0f} MiB, measured "
        f"{row.measured_bytes / 2**20:7.0f} ({row.memory_ratio:.3f})",
        flush=True,
    )
    for kind, parts in (("predicted", row.predicted_parts_ms), ("measured", row.measured_parts_ms)):
        print(f"   {kind:9} ms: " + ", ".join(f"{part} {ms:.3f}" for part, ms in parts.items()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
