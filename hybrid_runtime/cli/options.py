"""The options that several programs share, declared once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hybrid_runtime.errors import UsageError
from hybrid_runtime.sizes import parse_bytes

AnyCommand = Callable[..., Any]


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in the newest click
    """Bytes as people write them: 8G, 512M, 1.5GiB, 8000000000."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raise UsageError naming the flag for anything else."""
        del ctx
        try:
            return value if isinstance(value, int) else parse_bytes(str(value))
        except UsageError as error:
            raise UsageError(f"{param.opts[0] if param is not None else 'size'}: {error}") from error


def model_options(command: AnyCommand) -> AnyCommand:
    """Which model, and how its weights are kept."""
    options = (
        click.option(
            "--quant",
            type=click.Choice(["f32", "bf16", "q8", "q4"]),
            help="Weights of a model that is not converted yet. [default: f32 up to 268 M parameters, else q4]",
        ),
        click.option(
            "--group",
            type=int,
            metavar="N",
            help="Weights that share a scale, for q8 and q4: 32, 64 or 128. [default: 32]",
        ),
        click.option(
            "--ffn-activation",
            metavar="KIND",
            help="Overrules what config.json says: silu_glu, relu_glu, drelu, fatrelu:0.01, ...",
        ),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository. [default: main]"),
        click.option("--offline", is_flag=True, help="Use only what is on this disk."),
    )
    return _with(command, options)


ram_option = click.option(
    "--ram", type=Size(), metavar="SIZE", help="Promised peak of this process, e.g. 12G. [default: free]"
)
predictor_option = click.option(
    "--predictor",
    type=click.Choice(["mask", "trained", "off", "gate"]),
    help="mask: compute only neurons that the checkpoint's predictor lets through; trained: that the predictors of "
    "hybrid-predictors let through; off: all; "
    "gate: all gates, and the rest where the gate fires. [default: as the model was made]",
)
kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(["f32", "f16", "q8"]),
    help="Type of keys and values; q8 takes about half of f16. [default: f32 for f32 weights, else f16]",
)
load_option = click.option(
    "--load",
    type=click.Choice(["anonymous", "mmap"]),
    default="anonymous",
    show_default=True,
    help="anonymous: read the weights into this process's memory; mmap: leave them in their files, which "
    "starts at once, computes slower, and lets the system drop what it needs the room for.",
)
threads_option = click.option(
    "--threads", "-t", type=click.IntRange(1, 256), metavar="N", help="CPU threads. [default: physical cores]"
)
cache_dir_option = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="HYBRID_CACHE_DIR",
    help="Where converted models are kept. [default: the user's cache; env HYBRID_CACHE_DIR]",
)


def run_options(command: AnyCommand) -> AnyCommand:
    """How much memory, context and machine a loaded model may use."""
    context = click.option(
        "--ctx",
        type=click.IntRange(1),
        metavar="N",
        help="Context (for perplexity: a window) in tokens. [default: the model's, at most 4096; perplexity: 512]",
    )
    options = (ram_option, context, predictor_option, kv_cache_option, load_option, threads_option, cache_dir_option)
    return _with(command, options)


def _with(command: AnyCommand, options: tuple[Callable[[AnyCommand], AnyCommand], ...]) -> AnyCommand:
    for option in reversed(options):
        command = option(command)
    return command
