"""hybrid-profile: how often each neuron of a model fires on a text.

    hybrid-profile MODEL --text FILE --text FILE --tokens 200000
    hybrid-profile MODEL --merge DIR --merge DIR
    hybrid-profile MODEL --powerinfer DIR

The profile lies with the model's store, where hybrid-predictors, hybrid-place and hybrid-inspect find it. Interrupted
or killed, the same command goes on where it was.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import Size, cache_dir_option, model_options, ram_option, threads_option
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import BudgetError, UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.engine import OpenModel
    from hybrid_runtime.profiling.profile import Profile
    from hybrid_runtime.profiling.run import ProfileRequest
    from hybrid_runtime.progress import Progress
    from hybrid_runtime.store.reader import Store
    from hybrid_runtime.stores import ModelRequest

DEFAULT_TOKENS = 200_000
SHORT_STEP_S = 1.0  # what takes no longer is not shown
IDLE_OPTIONS = {  # by what is given instead of --text
    "merge": ("tokens", "window", "restart", "ram", "threads"),
    "powerinfer": ("window", "samples", "ram", "threads"),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: str
    text: tuple[Path, ...]
    tokens: int | None
    window: int
    samples: int
    merge: tuple[Path, ...]
    powerinfer: Path | None
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
    "--tokens", type=click.IntRange(0), metavar="N",
    help="Tokens to count; 0: all of the text; with --powerinfer how many were counted, 0: the largest count. "
    f"[default: {DEFAULT_TOKENS}; with --powerinfer 0]",
)  # fmt: skip
@click.option(
    "--window", type=click.IntRange(2, 1 << 16), default=512, show_default=True, metavar="N",
    help="Tokens that are computed together, each looking back on those before it.",
)  # fmt: skip
@click.option(
    "--samples", type=Size(), default="256M", show_default=True, metavar="SIZE",
    help="Disk that the sample for training predictors may take; as much again until it is finished.",
)  # fmt: skip
@click.option(
    "--merge", multiple=True, metavar="DIR", type=click.Path(path_type=Path),
    help="Instead of reading text, add up the profiles in these folders; repeat it.",
)  # fmt: skip
@click.option(
    "--powerinfer", metavar="DIR", type=click.Path(path_type=Path),
    help="Instead of reading text, take PowerInfer's counts: activation_0.pt (or .npy, .safetensors), ... of a dense "
    "model. Nothing in these files is run.",
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
    if bool(settings.text) + bool(settings.merge) + bool(settings.powerinfer) != 1:
        raise UsageError(
            "give --text FILE to read text, --merge DIR to add up profiles, or --powerinfer DIR to import counts, and "
            "one of them only"
        )
    _refuse_idle_options(settings)
    if settings.text:
        _show(settings, *_count(settings))
        return 0
    store = _store(settings)
    folder = _folder(settings, store)
    if settings.powerinfer is not None:
        _show(settings, _import(settings, settings.powerinfer, store, folder), folder)
    else:
        _show(settings, _merge(settings, store, folder), folder)
    return 0


def _refuse_idle_options(settings: Settings) -> None:
    """Raise UsageError for an option that was given and would do nothing."""
    context = click.get_current_context()
    for way, idle in IDLE_OPTIONS.items():
        for name in idle if getattr(settings, way) else ():
            if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
                raise UsageError(f"--{name} does nothing with --{way}, which reads no text; leave it out")


def _folder(settings: Settings, store: Store) -> Path:
    from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.beside import beside  # noqa: PLC0415

    return settings.output or beside(store, _cache_dir(settings)) / PROFILE_FOLDER


def _open(settings: Settings, request: ProfileRequest) -> OpenModel:
    """The model, if it fits with what its profile takes."""
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.engine import open_model  # noqa: PLC0415
    from hybrid_runtime.load_options import LoadOptions  # noqa: PLC0415
    from hybrid_runtime.machine import physical_cores, usable_cores  # noqa: PLC0415
    from hybrid_runtime.profiling.run import profiling_bytes  # noqa: PLC0415
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import find_model  # noqa: PLC0415

    threads = settings.threads or min(physical_cores(), usable_cores())
    use_threads(threads)
    progress = console_progress()
    options = LoadOptions(
        ram_bytes=settings.ram,
        num_positions=settings.window,
        profiles=False,
        threads=threads,
        cache_dir=settings.cache_dir,
        progress=progress,
        say=lambda line: say(line.replace("--ctx", "--window")),
    )
    try:
        config = find_model(_request(settings), _cache_dir(settings), progress).config
        return open_model(_request(settings), replace(options, extra_bytes=profiling_bytes(config, request)))
    except BudgetError as error:
        raise BudgetError(str(error).replace("--ctx", "--window or --samples")) from error
    except UsageError as error:
        raise UsageError(str(error).replace("--ctx", "--window")) from error


def _request(settings: Settings) -> ModelRequest:
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415  # imports torch

    return ModelRequest(
        settings.model, settings.quant, settings.group, settings.ffn_activation, settings.revision, settings.offline
    )


def _store(settings: Settings) -> Store:
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import find_model  # noqa: PLC0415  # imports torch

    progress = console_progress()
    found = find_model(_request(settings), _cache_dir(settings), progress, needs_tokenizer=False)
    return found.open(progress, say)


def _count(settings: Settings) -> tuple[Profile, Path]:
    from hybrid_runtime.profiling.run import ProfileRequest, make_profile  # noqa: PLC0415  # imports torch
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import load_store_tokenizer  # noqa: PLC0415
    from hybrid_runtime.text.documents import check_text_file  # noqa: PLC0415

    for path in settings.text:  # before a model is converted
        check_text_file(path)
    tokens = DEFAULT_TOKENS if settings.tokens is None else settings.tokens
    request = ProfileRequest(settings.text, tokens or None, settings.window, settings.samples, settings.restart)
    opened = _open(settings, request)
    folder = _folder(settings, opened.store)
    tokenizer, _ = load_store_tokenizer(opened.store)
    progress = console_progress()
    whole_windows = -(-tokens // settings.window) * settings.window
    seen: int | None = None

    def on_window(num_tokens: int) -> None:
        nonlocal seen
        if seen is None:
            label = f"profiling {opened.store.manifest.model}"
            label += f" after the first {num_tokens} tokens" if num_tokens else ""
            progress.start(label, max(0, whole_windows - num_tokens) or None, "tokens")
        else:
            progress.advance(num_tokens - seen)
        seen = num_tokens

    try:
        sequence, steps = opened.load_sequence(), LongSteps(progress)
        profile, was_there = make_profile(opened.store, sequence, tokenizer, request, folder, on_window, steps)
    except KeyboardInterrupt:
        say("\nwhat was counted is kept; the same command goes on from there")
        raise
    finally:
        progress.done()
    if was_there:
        say("this text was profiled before; --restart does it again")
    if profile.num_tokens < tokens:
        say(f"the text ended after {profile.num_tokens} of {tokens} tokens")
    return profile, folder


def _merge(settings: Settings, store: Store, folder: Path) -> Profile:
    from hybrid_runtime.profiling.merging import merge_profiles  # noqa: PLC0415  # imports torch
    from hybrid_runtime.profiling.profile_file import has_profile, read_header  # noqa: PLC0415
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415

    given = sum(read_header(source).num_samples for source in settings.merge if has_profile(source))
    profile = merge_profiles(store, settings.merge, folder, settings.samples, LongSteps(console_progress()))
    kept = read_header(folder).num_samples
    if kept < given:
        say(f"{kept} of {given} sampled tokens make a uniform sample of all texts")
    elif given == 0 and settings.samples:
        say("none of these profiles has a sample to train predictors on, so the merged one has none either")
    return profile


def _import(settings: Settings, source: Path, store: Store, folder: Path) -> Profile:
    from hybrid_runtime.profiling.profile_file import has_profile  # noqa: PLC0415
    from hybrid_runtime.store.beside import store_digest  # noqa: PLC0415  # imports torch
    from hybrid_tools.foreign_statistics import read_powerinfer_statistics, save_imported  # noqa: PLC0415

    config, model = store.manifest.config, store.manifest.model
    if has_profile(folder) and not settings.restart:
        raise UsageError(f"{folder}: holds a profile already; --restart replaces it, or choose another -o DIR")
    profile = read_powerinfer_statistics(source, config, model, store_digest(store), settings.tokens or None)
    if not settings.tokens:
        say(f"these files do not say how many tokens were counted: taking the largest count, {profile.num_tokens}")
    save_imported(profile, config, folder)
    return profile


def _cache_dir(settings: Settings) -> Path:
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch

    return settings.cache_dir or default_cache_dir()


class LongSteps:
    """A Progress that shows only steps which take longer than SHORT_STEP_S."""

    def __init__(self, shown: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self._shown = shown
        self._clock = clock
        self._step: tuple[str, int | None, str] | None = None  # that began, and is not shown yet
        self._started_s = 0.0
        self._done = 0

    def start(self, label: str, total: int | None, unit: str = "bytes") -> None:
        """Wait and see; another step that is shown ends here."""
        self._shown.done()
        self._step, self._started_s, self._done = (label, total, unit), self._clock(), 0

    def advance(self, n: int) -> None:
        """Count, and show the step once it has lasted."""
        self._done += n
        if self._step is None:
            self._shown.advance(n)
        elif self._clock() - self._started_s > SHORT_STEP_S:
            self._shown.start(*self._step)
            self._shown.advance(self._done)
            self._step = None

    def done(self) -> None:
        """End the step."""
        self._step = None
        self._shown.done()


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
