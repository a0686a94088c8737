"""hybrid-eval: how good a model is, by named protocols.

hybrid-eval perplexity --model M --text FILE --ctx 512 --protocol half
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import model_options, run_options
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.evaluation.perplexity import Protocol

DEFAULT_WINDOW = 512


@click.group(name="hybrid-eval", help="Measure the quality of a model.")
@click.version_option(__version__, prog_name="hybrid-eval")
def command() -> None:
    """Hold the subcommands."""


@command.command(name="perplexity", help="Perplexity of a model on a text.")
@click.option("--model", "-m", required=True, metavar="NAME", help="Path, alias or repository id.")
@click.option("--text", required=True, metavar="FILE", type=click.Path(path_type=Path), help="UTF-8 text.")
@click.option(
    "--protocol",
    type=click.Choice(["full", "half"]),
    default="half",
    show_default=True,
    help="full: every token, in windows that do not overlap; half: llama.cpp's, the second half of each window.",
)
@click.option(
    "--max-windows", type=click.IntRange(1), metavar="N", help="Stop after N windows. [default: the whole text]"
)
@run_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def perplexity(
    model: str,
    text: Path,
    protocol: str,
    max_windows: int | None,
    ram: int | None,
    ctx: int | None,
    predictor: str | None,
    kv_cache: str | None,
    load: str,
    threads: int | None,
    cache_dir: Path | None,
    quant: str | None,
    group: int | None,
    ffn_activation: str | None,
    revision: str | None,
    *,
    offline: bool,
    as_json: bool,
) -> int:
    """Load the model with a context of one window, score, print."""
    from hybrid_runtime.cli.loading import load_engine  # noqa: PLC0415  # imports torch
    from hybrid_runtime.evaluation.perplexity import Perplexity, measure_perplexity  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415

    content = read_text(text)
    window = DEFAULT_WINDOW if ctx is None else ctx
    engine = load_engine(
        ModelRequest(model, quant, group, ffn_activation, revision, offline),
        vram_bytes=0,
        ram_bytes=ram,
        num_positions=window,
        predictor=predictor,
        kv_dtype=kv_cache,
        load=load,
        threads=threads,
        cache_dir=cache_dir,
        verbose=False,
        scores=True,
    )

    def show(so_far: Perplexity) -> None:
        say(f"window {so_far.num_windows}: {so_far.value:.4f}")

    result = measure_perplexity(engine, content, cast("Protocol", protocol), window, show, max_windows=max_windows)
    weights = str(engine.store.manifest.quantization.weights)
    if as_json:
        click.echo(json.dumps({"model": model, "quantization": weights, "text": str(text)} | result.to_json()))
    else:
        click.echo(
            f"perplexity {result.value:.4f} +/- {result.standard_error:.4f} ({protocol}, ctx {window}, "
            f"{result.num_scored} tokens in {result.num_windows} windows, {weights})"
        )
    return 0


def read_text(path: Path) -> str:
    """Raise UsageError for a file that is not there or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path}: is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UsageError(f"--text {path}: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
