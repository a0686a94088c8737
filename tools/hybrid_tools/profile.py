"""hybrid-profile: how often each neuron of a model fires on a text.

    hybrid-profile MODEL --text FILE --text FILE --tokens 200000
    hybrid-profile MODEL --merge DIR --merge DIR

The profile lies with the model's store, where hybrid-predictors, hybrid-place and hybrid-inspect find it. Interrupted
or killed, the same command goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import Size, cache_dir_option, model_options, ram_option, threads_option
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.engine import OpenModel
    from hybrid_runtime.profiling.profile import Profile


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: str
    text: tuple[Path, ...]
    tokens: int
    window: int
    samples: int
    merge: tuple[Path, ...]
    output: Path | None
    restart: bool
    ram: int | None
    threads: int | None
    cache_dir: Path | None
    quant: str | None
    group: int | None
    ffn_activation: str | None
    revision: str | None
    offline: bool
    as_json: bool


@click.command(
    name="hybrid-profile",
    help="Count how often each neuron of MODEL (path, alias or repository id) fires on a text, to which experts the "
    "tokens go, and which neurons fire together; keep a sample of tokens to train predictors on.",
    context_settings={"max_content_width": 110},
)
@click.argument("model")
@click.option(
    "--text",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="UTF-8 text, plain or .gz, with <|endoftext|> between documents; may be repeated: the files take turns.",
)
@click.option(
    "--tokens", type=click.IntRange(0), default=200_000, show_default=True, metavar="N",
    help="Tokens to count; 0: all of the text.",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(2, 1 << 16), default=512, show_default=True, metavar="N",
    help="Tokens that are computed together, each looking back on those before it.",
)  # fmt: skip
@click.option(
    "--samples", type=Size(), default="256M", show_default=True, metavar="SIZE",
    help="Disk that the sample for training predictors may take.",
)  # fmt: skip
@click.option(
    "--merge", multiple=True, metavar="DIR", type=click.Path(path_type=Path),
    help="Instead of reading text, add up the profiles in these folders; repeat it.",
)  # fmt: skip
@click.option(
    "--output", "-o", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Where to leave the profile. [default: with the model's store]",
)  # fmt: skip
@click.option("--restart", is_flag=True, help="Forget an unfinished run, and do a finished one again.")
@ram_option
@threads_option
@model_options
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.version_option(__version__, prog_name="hybrid-profile")
def command(**options: object) -> int:
    """Parse, load, count, print."""
    return _run(Settings(**options))  # type: ignore[arg-type]  # click has checked each against its option


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _run(settings: Settings) -> int:
    if bool(settings.text) == bool(settings.merge):
        raise UsageError("give --text FILE to read text, or --merge DIR to add up profiles, and one of them only")
    from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.beside import beside  # noqa: PLC0415

    opened = _open(settings)
    folder = settings.output or beside(opened.store, _cache_dir(settings)) / PROFILE_FOLDER
    profile = _merge(settings, opened, folder) if settings.merge else _count(settings, opened, folder)
    _show(settings, profile, folder)
    return 0


def _open(settings: Settings) -> OpenModel:
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.engine import LoadOptions, open_model  # noqa: PLC0415
    from hybrid_runtime.machine import physical_cores, usable_cores  # noqa: PLC0415
    from hybrid_runtime.profiling.windows import text_digest  # noqa: PLC0415
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415

    text_digest(settings.text)  # files that are not there, before a model is converted
    threads = settings.threads or min(physical_cores(), usable_cores())
    use_threads(threads)
    request = ModelRequest(
        settings.model, settings.quant, settings.group, settings.ffn_activation, settings.revision, settings.offline
    )
    options = LoadOptions(
        ram_bytes=settings.ram,
        num_positions=settings.window,
        threads=threads,
        cache_dir=settings.cache_dir,
        progress=console_progress(),
        say=say,
    )
    return open_model(request, options, needs_tokenizer=not settings.merge)


def _count(settings: Settings, opened: OpenModel, folder: Path) -> Profile:
    from hybrid_runtime.profiling.run import ProfileRequest, make_profile  # noqa: PLC0415  # imports torch
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import load_store_tokenizer  # noqa: PLC0415

    request = ProfileRequest(
        settings.text, settings.tokens or None, settings.window, settings.samples, settings.restart
    )
    tokenizer, _ = load_store_tokenizer(opened.store)
    progress = console_progress()
    whole_windows = -(-settings.tokens // settings.window) * settings.window
    progress.start(f"profiling {opened.store.manifest.model}", whole_windows or None, "tokens")
    seen = 0

    def on_window(num_tokens: int) -> None:
        nonlocal seen
        progress.advance(num_tokens - seen)
        seen = num_tokens

    try:
        profile, was_there = make_profile(opened.store, opened.load_sequence(), tokenizer, request, folder, on_window)
    except KeyboardInterrupt:
        say("\nwhat was counted is kept; the same command goes on from there")
        raise
    finally:
        progress.done()
    if was_there:
        say("this text was profiled before; --restart does it again")
    return profile


def _merge(settings: Settings, opened: OpenModel, folder: Path) -> Profile:
    from hybrid_runtime.profiling.merging import merge_profiles  # noqa: PLC0415  # imports torch

    return merge_profiles(opened.store, settings.merge, folder, settings.samples)


def _cache_dir(settings: Settings) -> Path:
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch

    return settings.cache_dir or default_cache_dir()


def _show(settings: Settings, profile: Profile, folder: Path) -> None:
    shares = [profile.zero_share(idx) for idx in range(len(profile.layers))]
    if settings.as_json:
        values = {
            "model": profile.model,
            "folder": str(folder),
            "num_tokens": profile.num_tokens,
            "texts": [text.sha256 for text in profile.texts],
            "zero_share": profile.mean_zero_share,
            "zero_share_by_layer": shares,
        }
        click.echo(json.dumps(values))
        return
    say(f"{profile.model}: {profile.num_tokens} tokens, {100 * profile.mean_zero_share:.1f} % of the values are zero")
    say("by layer, %: " + " ".join(f"{100 * share:.1f}" for share in shares))
    click.echo(str(folder))


if __name__ == "__main__":
    sys.exit(main())
