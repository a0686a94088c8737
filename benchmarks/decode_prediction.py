"""Predicted against measured: seconds of a decoded token, and the peak of memory, for three shapes.

    python benchmarks/decode_prediction.py /tmp/shapes

The folder keeps the synthetic stores (5.5 GB). What is predicted is a plan's time and memory, as hybrid-place makes it,
from a profile of other tokens than those that are timed.
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

from hybrid_runtime.benchmarking.speed_test import SpeedTest, measure
from hybrid_runtime.engine import OpenModel, open_model
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import describe_machine, peak_rss_bytes, ram_limit_bytes, reset_peak_rss
from hybrid_runtime.placement.plan import Plan
from hybrid_runtime.placement.planning import Planner, make_planner
from hybrid_runtime.profiling.run import ProfileRequest, make_profile
from hybrid_runtime.progress import console_progress
from hybrid_runtime.speeds.kernel_speeds import KernelCalibration
from hybrid_runtime.stores import ModelRequest
from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic

NUM_TOKENS = 64
PROFILED_TOKENS = 512
WINDOW = 64
SAMPLE_BYTES = 64 << 20
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
    for length in (1, 100):  # a prompt takes the most memory
        cache.truncate(0)
        decoder.forward(torch.zeros(length, dtype=torch.int64), cache)
    peak_bytes = peak_rss_bytes()  # before measuring the machine, which takes memory of its own
    plans, measured, parts = take_turns(opened, sequence, folder / "speeds")
    plan = sorted(plans, key=lambda each: each.total_s)[ROUNDS // 2]
    return Row(
        name,
        opened.num_threads,
        1e3 * plan.total_s,
        1e3 * statistics.median(measured),
        plan.ram_used_bytes,
        peak_bytes,
        {part.kind: 1e3 * part.seconds for part in plan.parts} | {"neurons": 1e3 * plan.neurons_s},
        {part: 1e3 * statistics.median(each[part] for each in parts) for part in parts[0]},
        [1e3 * each.total_s for each in plans],
        [1e3 * seconds for seconds in measured],
    )


def take_turns(
    opened: OpenModel, sequence: TokenSequence, cache_dir: Path
) -> tuple[list[Plan], list[float], list[dict[str, float]]]:
    """Plans, measured seconds of a token, and the measured seconds by label, of every round."""
    decoder, cache = sequence.decoder, sequence.cache
    test, row_format = SpeedTest(0, NUM_TOKENS, 0), opened.store.manifest.quantization.weights
    planner = planner_of(opened, sequence, cache_dir)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        calibration = KernelCalibration(row_format, decoder.team, Path(scratch))
    plans, measured, parts = [], [], []
    for _ in range(ROUNDS):
        speeds = replace(planner.speeds, kernels=(calibration.measure(CALIBRATION_ROUNDS),))
        plan, _ = replace(planner, speeds=speeds).plan(0, ram_limit_bytes(), allow_disk=False)
        plans.append(plan)
        program = decoder.program_of(cache)
        program.reset_ticks()
        found = measure(decoder, cache, test, repetitions=1, warms_up=False)
        measured.append(1 / found.speeds[0])
        ticks = program.ticks_by_label()
        per_tick = found.samples[0].kernel_s / NUM_TOKENS / sum(ticks.values())
        parts.append({label: count * per_tick for label, count in ticks.items()})
    return plans, measured, parts


class RandomTokens:
    """Stands in for a tokenizer, which the synthetic models lack: a token for every letter."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._generator = torch.Generator().manual_seed(77)

    def encode(self, text: str, **_: object) -> list[int]:
        return torch.randint(0, self._vocab_size, (len(text),), generator=self._generator).tolist()


def planner_of(opened: OpenModel, sequence: TokenSequence, cache_dir: Path) -> Planner:
    """From a profile that is made here."""
    decoder = sequence.decoder
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        text, folder = Path(scratch) / "text", Path(scratch) / "profile"
        text.write_text("x" * (PROFILED_TOKENS * 2))
        tokenizer: Any = RandomTokens(decoder.config.vocab_size)
        request = ProfileRequest((text,), PROFILED_TOKENS, WINDOW, SAMPLE_BYTES)
        make_profile(opened.store, sequence, tokenizer, request, folder, lambda _: None)
        return make_planner(
            opened.store,
            folder,
            None,
            mode=decoder.predictor_mode,
            num_positions=NUM_TOKENS + 1,  # a plan's times are of half of it
            kv_dtype=opened.kv_dtype,
            num_threads=opened.num_threads,
            gpu_name=None,
            cache_dir=cache_dir,
            say=lambda line: print(line, file=sys.stderr),
            program_bytes=opened.memory_plan.program,
        )


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
