"""hybrid-run: text from a model.

    hybrid-run                                                  the demo, interactively
    hybrid-run --model model.gguf --prompt "Once upon a time"   one answer
    echo "Why is the sky blue?" | hybrid-run --model DIR        the prompt from stdin

The answer goes to stdout as it is made, everything else to stderr.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import Size, model_options, run_options
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import UsageError
from hybrid_runtime.garbage import without_collections
from hybrid_runtime.shipped import DEFAULT_MODEL

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.cli.answer import Watcher
    from hybrid_runtime.engine import Engine
    from hybrid_runtime.generation.sampling import SamplingParams

MOST_STDIN_CHARS = 1 << 25  # some eight million tokens


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: str | None
    prompt: str | None
    system: str | None
    raw: bool
    vram: int
    simulate_gpu: bool
    ram: int | None
    ctx: int | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    seed: int | None
    predictor: str | None
    kv_cache: str | None
    load: str
    threads: int | None
    quant: str | None
    group: int | None
    ffn_activation: str | None
    revision: str | None
    offline: bool
    cache_dir: Path | None
    as_json: bool
    verbose: bool
    trace: Path | None


@click.command(name="hybrid-run", help="Generate text from a model.", context_settings={"max_content_width": 110})
@click.option(
    "--model", "-m", metavar="NAME", help="Path, alias or repository id (see models.md). [default: tinystories-moe]"
)
@click.option("--prompt", "-p", metavar="TEXT", help="What to answer or continue. [default: stdin, else interactive]")
@click.option("--system", metavar="TEXT", help="System message of a chat.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, also where the model has a chat template.")
@click.option("--vram", type=Size(), default="0", show_default=True, metavar="SIZE", help="GPU memory to use, e.g. 8G.")
@click.option(
    "--simulate-gpu", is_flag=True, help="Keep what --vram plans for the GPU in RAM, beside --ram, and compute it here."
)
@click.option(
    "--max-tokens", "-n", type=int, default=512, show_default=True, metavar="N", help="Longest answer, in tokens."
)
@click.option("--temperature", type=float, default=0.8, show_default=True, help="0 takes the likeliest token always.")
@click.option("--top-k", type=int, default=40, show_default=True, help="Draw from the K likeliest tokens; 0 is off.")
@click.option("--top-p", type=float, default=0.95, show_default=True, help="Draw from the likeliest that sum up to P.")
@click.option(
    "--min-p", type=float, default=0.05, show_default=True, help="Leave out tokens below P times the likeliest."
)
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 discourages repeating.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated.")
@click.option("--seed", type=int, metavar="N", help="Same seed, same answer. [default: a new one]")
@run_options
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("--verbose", "-v", is_flag=True, help="Say what was chosen and why, and each second what it does.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what the kernels did in the first few tokens, for chrome://tracing or ui.perfetto.dev.",
)
@click.version_option(__version__, prog_name="hybrid-run")
def command(**options: object) -> int:
    """Parse, load, print."""
    return _run(Settings(**options))  # type: ignore[arg-type]  # click has checked each against its option


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _run(settings: Settings) -> int:
    prompt = _prompt_of(settings)
    for name, text in (("the prompt", prompt), ("--system", settings.system), ("--stop", "".join(settings.stop))):
        _refuse_broken_text(name, text or "")
    with without_collections(freezes=True):  # while torch is imported: of all that is made then, nothing is garbage
        from hybrid_runtime.cli.status import StatusLine  # noqa: PLC0415  # imports torch
        from hybrid_runtime.cli.trace import TraceRecorder  # noqa: PLC0415

        params = _sampling_params(settings)
        engine = _load(settings)
    if settings.system is not None and (settings.raw or engine.chat_template is None):
        why = "--raw leaves out" if settings.raw else f"{engine.store.manifest.model} has no"
        raise UsageError(f"--system: {why} the chat template that would carry it; leave --system out")
    if prompt == "" and settings.prompt is None:
        say("stdin is empty: beginning from nothing (give --prompt TEXT to begin from a text)")
    trace = None if settings.trace is None else TraceRecorder(engine, settings.trace)
    watchers: list[Watcher] = [*([StatusLine(engine)] if settings.verbose else []), *([trace] if trace else [])]
    try:
        return _answer(engine, prompt, settings, params, watchers)
    finally:
        if trace is not None:
            trace.write()


def _answer(
    engine: Engine, prompt: str | None, settings: Settings, params: SamplingParams, watchers: Sequence[Watcher]
) -> int:
    from hybrid_runtime.cli.answer import answer_once, answer_repeatedly  # noqa: PLC0415  # imports torch

    if prompt is None:
        return answer_repeatedly(engine, settings.system, params, raw=settings.raw, watchers=watchers)
    to_stdout = not settings.as_json
    answer = answer_once(
        engine, prompt, settings.system, params, raw=settings.raw, to_stdout=to_stdout, watchers=watchers
    )
    if settings.as_json:
        click.echo(json.dumps({"model": engine.store.manifest.model, "seed": params.seed} | answer.to_json()))
    return answer.exit_code


def _prompt_of(settings: Settings) -> str | None:
    """--prompt, else what stdin holds, without the newline that echo and editors put at its end; None: a terminal."""
    if settings.prompt is not None:
        return settings.prompt
    if sys.stdin is None:
        raise UsageError("stdin is closed, so there is nothing to answer; give --prompt TEXT")
    if sys.stdin.isatty():
        if settings.as_json:
            raise UsageError("--json needs a --prompt, or a prompt on stdin")
        return None
    try:
        prompt = sys.stdin.read(MOST_STDIN_CHARS + 1)
    except UnicodeDecodeError as error:
        raise UsageError("stdin is not UTF-8 text; convert it first, for example with iconv") from error
    if len(prompt) > MOST_STDIN_CHARS:
        raise UsageError(f"stdin holds more than {MOST_STDIN_CHARS} characters, which no context takes; send less")
    return prompt.removesuffix("\n").removesuffix("\r")


def _refuse_broken_text(name: str, text: str) -> None:
    """A shell passes on bytes that are not UTF-8, which reach us as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name}: is not UTF-8 text at character {error.start}; write it in UTF-8") from error


def _sampling_params(settings: Settings) -> SamplingParams:
    from hybrid_runtime.generation.sampling import SamplingParams  # noqa: PLC0415  # imports torch

    try:
        return SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            seed=secrets.randbits(32) if settings.seed is None else settings.seed,
            max_tokens=settings.max_tokens,
            stop=settings.stop,
        )
    except UsageError as error:
        field = str(error).partition(":")[0].partition("[")[0]  # such as top_k
        raise UsageError(str(error).replace(field, "--" + field.replace("_", "-"), 1)) from error


def _load(settings: Settings) -> Engine:
    if settings.trace is not None:
        from hybrid_runtime.cli.trace import require_writable  # noqa: PLC0415  # imports torch

        require_writable(settings.trace)
    if settings.simulate_gpu and not settings.vram:
        raise UsageError("--simulate-gpu: how much memory has the GPU? give --vram SIZE")
    from hybrid_runtime.cli.loading import load_engine  # noqa: PLC0415  # imports torch
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415

    if settings.model is None:
        say(f"no --model given: running {DEFAULT_MODEL}, a small model that writes stories for children; see models.md")
    request = ModelRequest(
        DEFAULT_MODEL if settings.model is None else settings.model,
        settings.quant,
        settings.group,
        settings.ffn_activation,
        settings.revision,
        settings.offline,
    )
    engine = load_engine(
        request,
        vram_bytes=settings.vram,
        ram_bytes=settings.ram,
        num_positions=settings.ctx,
        predictor=settings.predictor,
        kv_dtype=settings.kv_cache,
        load=settings.load,
        threads=settings.threads,
        cache_dir=settings.cache_dir,
        verbose=settings.verbose,
        simulate_gpu=settings.simulate_gpu,
    )
    if settings.vram > 0 and engine.spread is None and engine.config.activation.is_sparse:
        from hybrid_runtime.cli.offline import prepare_plan  # noqa: PLC0415  # only where a plan is wanted

        prepare_plan(engine, settings.vram, settings.ram, settings.cache_dir)
    return engine


if __name__ == "__main__":
    sys.exit(main())
