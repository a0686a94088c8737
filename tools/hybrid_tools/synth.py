"""hybrid-synth: a store with a published model's shapes and random weights, for measuring speed without the weights.

    hybrid-synth --like turbosparse-mistral --scale 0.25 --active 0.12 -o DIR

Every layer keeps its true shape; a smaller --scale means fewer of them. In sparse models the share of neurons that fire
for a token, and how unevenly they fire, are as asked. What such a model writes means nothing. Killed at any moment, the
same command goes on where it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.program import run_program, say


@click.command(name="hybrid-synth", help="Write a store of random weights with the shapes of a published model.")
@click.option("--like", required=True, metavar="NAME", help="The model whose shapes it has: turbosparse-mistral, ...")
@click.option(
    "--output", "-o", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The store."
)
@click.option("--scale", type=float, metavar="S", help="Share of the layers that are made. [default: 1]")
@click.option("--layers", "num_layers", type=int, metavar="N", help="Number of layers, instead of --scale.")
@click.option(
    "--active",
    type=float,
    metavar="A",
    help="Share of neurons that fire for a token. [default: the one published for the model]",
)
@click.option(
    "--skew",
    type=float,
    metavar="S",
    help="Share of neurons that makes 80 % of all firings; smaller is more uneven. [default: 0.43, ungated: 0.26]",
)
@click.option(
    "--quant", type=click.Choice(["f32", "bf16", "q8", "q4"]), default="q4", show_default=True, help="Its weights."
)
@click.option(
    "--group", type=int, metavar="N", help="Weights that share a scale, for q8 and q4: 32, 64 or 128. [default: 32]"
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of all random numbers.")
@click.version_option(__version__, prog_name="hybrid-synth")
def command(
    like: str,
    folder: Path,
    scale: float | None,
    num_layers: int | None,
    active: float | None,
    skew: float | None,
    quant: str,
    group: int | None,
    seed: int,
) -> int:
    """Parse, write, print where the store is and how it went."""
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415  # the rest imports torch
    from hybrid_runtime.sizes import format_bytes  # noqa: PLC0415
    from hybrid_runtime.synthetic.request import SyntheticRequest, make_synthetic  # noqa: PLC0415

    started_s = time.perf_counter()
    request = SyntheticRequest(like, scale, num_layers, active, skew, quant, group, seed)
    store = make_synthetic(request, folder, console_progress())
    seconds = time.perf_counter() - started_s
    manifest = store.manifest
    say(f"{manifest.model}: {format_bytes(store.num_bytes)} in {manifest.quantization.weights}, {seconds:.1f} s")
    click.echo(str(folder))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
