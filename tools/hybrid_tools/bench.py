"""hybrid-bench: how fast a model reads a prompt and generates, in llama-bench's columns and with what bounds it.

    hybrid-bench -m STORE -p 512 -n 128 -d 0,4096 -r 5
    hybrid-bench -m STORE -p 0 -n 32 -o json

Token ids are random and nothing is sampled, as in llama-bench, so a model without a tokenizer will do. Results go to
stdout, progress to stderr.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import (
    cache_dir_option,
    kv_cache_option,
    load_option,
    model_options,
    predictor_option,
    ram_option,
    threads_option,
)
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.benchmarking.speed_test import Measurement, SpeedTest
    from hybrid_runtime.engine import OpenModel
    from hybrid_runtime.load_options import LoadOptions
    from hybrid_runtime.stores import ModelRequest
    from hybrid_tools.bench_rows import BenchRow

MOST_TOKENS = 1 << 22  # of one number on the command line
FORMATS = ("md", "csv", "json", "jsonl")


class Counts(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click
    """Whole numbers with commas between them: 512 or 0,4096."""

    name = "counts"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Raise UsageError naming the flag for anything else."""
        del ctx
        flag = param.opts[0] if param is not None else "numbers"
        words = str(value).split(",")
        if not all(word.isascii() and word.isdecimal() and int(word[:9]) <= MOST_TOKENS for word in words):
            raise UsageError(f"{flag} {value}: expected token counts up to {MOST_TOKENS}, such as 512 or 0,4096")
        return tuple(int(word[:9]) for word in words)


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    generated: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, ...], ...]
    depths: tuple[tuple[int, ...], ...]
    repetitions: int
    output: str
    no_warmup: bool
    ram: int | None
    predictor: str | None
    kv_cache: str | None
    load: str
    threads: int | None
    cache_dir: Path | None
    quant: str | None
    group: int | None
    ffn_activation: str | None
    revision: str | None
    offline: bool


@click.command(name="hybrid-bench", help="Measure prefill and decode.", context_settings={"max_content_width": 110})
@click.option("--model", "-m", multiple=True, required=True, metavar="NAME", help="Store or checkpoint; repeatable.")
@click.option(
    "--n-prompt", "-p", "prompts", type=Counts(), multiple=True, help="Prompt tokens; 0: none. [default: 512]"
)
@click.option("--n-gen", "-n", "generated", type=Counts(), multiple=True, help="Tokens to generate. [default: 128]")
@click.option("-pg", "pairs", type=Counts(), multiple=True, metavar="PP,TG", help="A prompt, then tokens, as one test.")
@click.option("--n-depth", "-d", "depths", type=Counts(), multiple=True, help="Tokens before each test. [default: 0]")
@click.option("--repetitions", "-r", type=click.IntRange(1), default=5, show_default=True, metavar="N")
@click.option("--output", "-o", type=click.Choice(FORMATS), default="md", show_default=True)
@click.option("--no-warmup", is_flag=True, help="Measure the first repetition like any other.")
@ram_option
@predictor_option
@kv_cache_option
@load_option
@threads_option
@cache_dir_option
@model_options
@click.version_option(__version__, prog_name="hybrid-bench")
def command(**options: object) -> int:
    """Parse, measure every model, print."""
    return _run(Settings(**options))  # type: ignore[arg-type]  # click has checked each against its option


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _run(settings: Settings) -> int:
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.load_options import LoadOptions  # noqa: PLC0415
    from hybrid_runtime.machine import physical_cores, usable_cores  # noqa: PLC0415
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415
    from hybrid_tools.bench_rows import show_rows  # noqa: PLC0415

    tests = _tests(settings)
    use_threads(settings.threads or min(physical_cores(), usable_cores()))
    options = LoadOptions(
        ram_bytes=settings.ram,
        num_positions=max(test.num_positions for test in tests),
        predictor=settings.predictor,  # type: ignore[arg-type]  # click offers only its modes, as below
        kv_dtype=settings.kv_cache,  # type: ignore[arg-type]
        load=settings.load,  # type: ignore[arg-type]
        threads=settings.threads,
        cache_dir=settings.cache_dir,
        progress=console_progress(),
        say=say,
    )
    rows: list[BenchRow] = []
    for model in settings.model:
        request = ModelRequest(
            model, settings.quant, settings.group, settings.ffn_activation, settings.revision, settings.offline
        )
        rows += _bench(request, options, tests, settings)
    for line in show_rows(rows, settings.output):
        click.echo(line)
    return 0


def _tests(settings: Settings) -> list[SpeedTest]:
    """Every combination, in llama-bench's order: for each depth the prompts, the generations, the pairs."""
    from hybrid_runtime.benchmarking.speed_test import SpeedTest  # noqa: PLC0415  # imports torch

    prompts, generated, depths = (
        sum(given, ()) or (default,)
        for given, default in ((settings.prompts, 512), (settings.generated, 128), (settings.depths, 0))
    )
    for pair in settings.pairs:
        if len(pair) != 2 or not sum(pair):
            raise UsageError(f"-pg {','.join(map(str, pair))}: expected two counts, of the prompt and of what follows")
    shapes = [(count, 0) for count in prompts] + [(0, count) for count in generated]
    shapes += [(prompt, count) for prompt, count in settings.pairs]
    tests = [SpeedTest(*shape, depth) for depth in depths for shape in shapes if any(shape)]
    if not tests:
        raise UsageError("-p 0 -n 0: nothing to measure; give one of -p, -n and -pg above 0")
    return tests


def _bench(
    request: ModelRequest, options: LoadOptions, tests: Sequence[SpeedTest], settings: Settings
) -> list[BenchRow]:
    """Load one model, run every test, and measure the memory's bandwidth when the model is gone."""
    from hybrid_runtime.engine import open_model  # noqa: PLC0415  # imports torch
    from hybrid_runtime.machine import peak_rss_bytes, reset_peak_rss  # noqa: PLC0415
    from hybrid_tools.bench_rows import Run, rows_of  # noqa: PLC0415

    opened = open_model(request, options, needs_tokenizer=False)
    reset_peak_rss()
    tested_at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    load_s, measurements = _load_and_measure(opened, tests, settings)
    peak_bytes = peak_rss_bytes()
    gc.collect()  # whatever refers to itself in the model: the next one, and the bandwidth, want its memory
    num_threads = opened.num_threads
    run = Run(opened, request.name, tested_at, num_threads, load_s, peak_bytes, _bandwidth(num_threads))
    return rows_of(run, measurements)


def _load_and_measure(
    opened: OpenModel, tests: Sequence[SpeedTest], settings: Settings
) -> tuple[float, list[Measurement]]:
    from hybrid_runtime.benchmarking.speed_test import measure  # noqa: PLC0415  # imports torch

    started_s = time.perf_counter()
    sequence = opened.load_sequence()
    load_s = time.perf_counter() - started_s
    say(f"{opened.store.manifest.model}: loaded in {load_s:.2f} s")
    measurements = []
    for test in tests:
        found = measure(
            sequence.decoder, sequence.cache, test, repetitions=settings.repetitions, warms_up=not settings.no_warmup
        )
        say(f"{opened.store.manifest.model}: {test.label} {found.mean_speed:.2f} tokens/s")
        measurements.append(found)
    return load_s, measurements


def _bandwidth(num_threads: int) -> float:
    """Bytes a second that as many threads read from memory now."""
    from hybrid_kernels.bandwidth.op import read_bandwidth  # noqa: PLC0415  # compiles
    from hybrid_kernels.team import Team  # noqa: PLC0415

    team = Team(num_threads)
    try:
        return read_bandwidth(team)
    finally:
        team.close()


if __name__ == "__main__":
    sys.exit(main())
