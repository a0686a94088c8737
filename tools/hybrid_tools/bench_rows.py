"""What hybrid-bench found, as rows: llama-bench's fields under its names, then ours; and the formats to show it in."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_runtime import __version__
from hybrid_runtime.benchmarking.bytes_touched import (
    BytesTouched,
    NeuronRows,
    all_neurons,
    bytes_touched,
    num_parameters,
)
from hybrid_runtime.benchmarking.speed_test import Measurement, deviation
from hybrid_runtime.engine import OpenModel
from hybrid_runtime.machine import cpu_name
from hybrid_runtime.sizes import format_bytes, format_decimal_bytes

COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s", "GB/s", "of memory", "overhead", "active")


@dataclass(frozen=True, slots=True)
class Run:
    """What the tests of one model have in common. bandwidth: bytes a second, measured in this process."""

    opened: OpenModel
    model_filename: str
    test_time: str
    num_threads: int
    load_s: float
    peak_rss_bytes: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One test of one model. None: means nothing where prompts are in the test.

    overhead: share of the time outside compiled code; active_fraction: of the neurons that a token could compute;
    achieved_gbs: bytes touched times tokens, a second.
    """

    build_version: str
    cpu_info: str
    backends: str
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    n_threads: int
    kv_cache: str
    predictor: str
    load_mode: str
    n_prompt: int
    n_gen: int
    n_depth: int
    test: str
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    overhead: float
    active_fraction: float | None
    load_s: float
    peak_rss_bytes: int
    bandwidth_gbs: float
    achieved_gbs: float | None
    bytes_per_token: dict[str, float] | None

    @property
    def bytes_total(self) -> float | None:
        """Bytes that one token touches."""
        return None if self.bytes_per_token is None else sum(self.bytes_per_token.values())


def rows_of(run: Run, measurements: Sequence[Measurement]) -> list[BenchRow]:
    """One row a measurement, in their order."""
    return [_row(run, measurement) for measurement in measurements]


def show_rows(rows: Sequence[BenchRow], output: str) -> Iterator[str]:
    """Lines of the format: md, csv, json or jsonl."""
    if output == "json":
        yield json.dumps([asdict(row) for row in rows], indent=2)
    elif output == "jsonl":
        yield from (json.dumps(asdict(row)) for row in rows)
    elif output == "csv":
        yield from _csv(rows)
    else:
        yield from _markdown(rows)


def _row(run: Run, measurement: Measurement) -> BenchRow:
    opened, test = run.opened, measurement.test
    manifest = opened.store.manifest
    samples_ns = tuple(round(sample.seconds * 1e9) for sample in measurement.samples)
    touched = _touched(opened, measurement) if test.is_decode else None
    return BenchRow(
        build_version=__version__,
        cpu_info=cpu_name(),
        backends=instruction_set(),
        model_filename=run.model_filename,
        model_type=f"{manifest.model} {manifest.quantization.weights}",
        model_size=opened.store.num_bytes,
        model_n_params=num_parameters(manifest),
        n_threads=run.num_threads,
        kv_cache=opened.kv_dtype,
        predictor=opened.predictor_mode,
        load_mode=opened.load,
        n_prompt=test.num_prompt,
        n_gen=test.num_generated,
        n_depth=test.depth,
        test=test.label,
        test_time=run.test_time,
        avg_ns=round(statistics.fmean(samples_ns)),
        stddev_ns=round(deviation([float(each) for each in samples_ns])),
        avg_ts=measurement.mean_speed,
        stddev_ts=deviation(measurement.speeds),
        samples_ns=samples_ns,
        samples_ts=tuple(measurement.speeds),
        overhead=measurement.overhead,
        active_fraction=measurement.per_token("active_neurons") / all_neurons(manifest).up if test.is_decode else None,
        load_s=run.load_s,
        peak_rss_bytes=run.peak_rss_bytes,
        bandwidth_gbs=run.bandwidth / 1e9,
        achieved_gbs=None if touched is None else touched.total * measurement.mean_speed / 1e9,
        bytes_per_token=None if touched is None else touched.by_part(),
    )


def _touched(opened: OpenModel, measurement: Measurement) -> BytesTouched:
    return bytes_touched(
        opened.store.manifest,
        NeuronRows(
            measurement.per_token("gate_rows"), measurement.per_token("up_rows"), measurement.per_token("down_rows")
        ),
        uses_predictor=opened.predictor_mode == "mask",
        mean_length=measurement.test.mean_length,
        kv_dtype=opened.kv_dtype,
    )


def _csv(rows: Sequence[BenchRow]) -> Iterator[str]:
    """One column a field; lists with blanks between their values, the bytes with one column a part."""
    parts = [name for row in rows if row.bytes_per_token for name in row.bytes_per_token]
    buffer = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        values = {name: _cell(value) for name, value in asdict(row).items() if name != "bytes_per_token"}
        touched = row.bytes_per_token or {}
        values |= {f"bytes_{name}": _cell(touched.get(name)) for name in dict.fromkeys(parts)}
        if writer is None:
            writer = csv.DictWriter(buffer, list(values), lineterminator="\n")
            writer.writeheader()
        writer.writerow(values)
    yield from buffer.getvalue().splitlines()


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _markdown(rows: Sequence[BenchRow]) -> Iterator[str]:
    """The table, then what each model's tests have in common and where its bytes go."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| --- |" + " ---: |" * (len(COLUMNS) - 1)
    for row in rows:
        yield "| " + " | ".join(_cells(row)) + " |"
    shown = set()
    for row in rows:
        key = (row.model_filename, row.test_time)
        if key not in shown:
            shown.add(key)
            yield ""
            yield (
                f"{row.model_type}: loaded in {row.load_s:.2f} s ({row.load_mode}), peak memory "
                f"{format_bytes(row.peak_rss_bytes)}, memory read at {row.bandwidth_gbs:.1f} GB/s, "
                f"predictor {row.predictor}, keys and values {row.kv_cache}"
            )
        if row.bytes_per_token is not None and row.bytes_total is not None:
            parts = ", ".join(
                f"{name} {format_decimal_bytes(size)}" for name, size in row.bytes_per_token.items() if size
            )
            yield f"{row.test}: {format_decimal_bytes(row.bytes_total)} a token: {parts}"


def _cells(row: BenchRow) -> tuple[str, ...]:
    return (
        row.model_type,
        format_bytes(row.model_size),
        _count(row.model_n_params),
        row.backends,
        str(row.n_threads),
        row.test,
        f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
        "" if row.achieved_gbs is None else f"{row.achieved_gbs:.2f}",
        "" if row.achieved_gbs is None else f"{100 * row.achieved_gbs / row.bandwidth_gbs:.0f} %",
        f"{100 * row.overhead:.1f} %",
        "" if row.active_fraction is None else f"{100 * row.active_fraction:.1f} %",
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
