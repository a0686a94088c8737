"""hybrid-convert: a published checkpoint into a store.

    hybrid-convert MODEL -o DIR --quant q4 --group 32

Needs 1 GiB of memory and the largest tensor, whatever the model's size. Killed at any moment, the same command goes on
where it was; a store that is already in DIR stays usable until the new one is complete.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import cache_dir_option, model_options
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import StoreError

if TYPE_CHECKING:  # the reader imports torch, and --help need not wait for it
    from hybrid_runtime.store.reader import Store


@click.command(name="hybrid-convert", help="Convert MODEL (path, alias or repository id) into a store in DIR.")
@click.argument("model")
@click.option(
    "--output", "-o", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The store."
)
@model_options
@cache_dir_option
@click.option("--verify", is_flag=True, help="Read the finished store once more and check every part's sha256.")
@click.version_option(__version__, prog_name="hybrid-convert")
def command(
    model: str,
    folder: Path,
    quant: str | None,
    group: int | None,
    ffn_activation: str | None,
    revision: str | None,
    cache_dir: Path | None,
    *,
    offline: bool,
    verify: bool,
) -> int:
    """Parse, convert, print where the store is and how it went."""
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # the engine imports torch
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.sizes import format_bytes  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest, convert_model  # noqa: PLC0415

    started_s = time.perf_counter()
    request = ModelRequest(model, quant, group, ffn_activation, revision, offline)
    store = convert_model(request, folder, cache_dir or default_cache_dir(), console_progress())
    if verify:
        _verify(store)
    seconds = time.perf_counter() - started_s
    weights = store.manifest.quantization.weights
    say(f"{model}: {format_bytes(store.num_bytes)} in {weights}, {seconds:.1f} s{', verified' if verify else ''}")
    click.echo(str(folder))
    return 0


def _verify(store: Store) -> None:
    try:
        store.verify()
    except StoreError as error:
        # A part of the right size counts as done: without this, converting again would keep it.
        raise StoreError(f"{error}, after removing that file") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
