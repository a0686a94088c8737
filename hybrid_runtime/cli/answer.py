"""Answering one prompt, or a conversation at the terminal. Ctrl-C ends an answer and keeps what was said."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import click

from hybrid_runtime.cli.program import EXIT_INTERRUPTED, say
from hybrid_runtime.cli.status import TiersUsed, closing_lines, tiers_used
from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import HybridError
from hybrid_runtime.generation.meter import DecodeMeter
from hybrid_runtime.generation.report import GenerationReport
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.machine import peak_rss_bytes
from hybrid_runtime.text.chat import Message

PROMPT = "> "
HELP = "Type a message and Enter. Ctrl-C ends an answer; /reset forgets what was said; /bye or Ctrl-D leaves."
NO_TEMPLATE = "This model has no chat template: what you type is continued as text."


@dataclass(frozen=True, slots=True)
class Answer:
    """What one prompt brought. tiers: None where all of the model is in one memory."""

    text: str
    report: GenerationReport
    quantization: str
    peak_rss_bytes: int
    tiers: TiersUsed | None

    @property
    def exit_code(self) -> int:
        """130 when Ctrl-C ended it, else 0."""
        return EXIT_INTERRUPTED if self.report.finish_reason == "cancelled" else 0

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return {
            "text": self.text,
            "quantization": self.quantization,
            "peak_rss_bytes": self.peak_rss_bytes,
            "tiers": None if self.tiers is None else asdict(self.tiers),
        } | self.report.to_json()


class Watcher(Protocol):
    """Looks at the engine after each piece of an answer."""

    def look(self) -> None:
        """After a piece."""


def answer_once(
    engine: Engine,
    prompt: str,
    system: str | None,
    params: SamplingParams,
    *,
    raw: bool,
    to_stdout: bool,
    watchers: Sequence[Watcher] = (),
) -> Answer:
    """Answer the prompt (as a chat's first message where the model has a template), then print the summary."""
    meter = DecodeMeter(engine.sequence)
    if raw or engine.chat_template is None:
        pieces = engine.generate(prompt, params)
    else:
        pieces = engine.chat(_opening(system, prompt), params)
    text = _collect(pieces, to_stdout=to_stdout, watchers=watchers)
    report = engine.last_report
    assert report is not None
    tiers = tiers_used(engine, meter.total())
    answer = Answer(text, report, str(engine.store.manifest.quantization.weights), peak_rss_bytes(), tiers)
    _summarise(engine, report, meter)
    return answer


def answer_repeatedly(
    engine: Engine,
    system: str | None,
    params: SamplingParams,
    *,
    raw: bool,
    watchers: Sequence[Watcher] = (),
) -> int:
    """Read messages from the terminal until its end, then print the summary of the last answer."""
    meter = DecodeMeter(engine.sequence)
    is_chat = engine.chat_template is not None and not raw
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401, PLC0415  # from now on input() can edit a line and recall earlier ones
    say(HELP if is_chat else f"{NO_TEMPLATE} {HELP}")
    conversation = _Conversation(engine, system, params, watchers, is_chat=is_chat)
    while (line := _read_line()) is not None:
        if line == "/bye":
            break
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            say(HELP)
        elif line:
            conversation.answer(line)
    if engine.last_report is not None:
        _summarise(engine, engine.last_report, meter)
    return 0


class _Conversation:
    """What was said so far, which is each answer's context: messages of a chat, or one growing text."""

    def __init__(
        self,
        engine: Engine,
        system: str | None,
        params: SamplingParams,
        watchers: Sequence[Watcher],
        *,
        is_chat: bool,
    ) -> None:
        self._watchers = watchers
        self._engine, self._system, self._params, self._is_chat = engine, system, params, is_chat
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = _opening(self._system)
        self._text = ""

    def answer(self, line: str) -> None:
        """Print the answer. What cannot be answered is said and forgotten; the conversation goes on."""
        try:
            if self._is_chat:
                messages = [*self._messages, Message("user", line)]
                answer = _collect(self._engine.chat(messages, self._params), to_stdout=True, watchers=self._watchers)
                self._messages = [*messages, Message("assistant", answer)]
            else:
                text = self._text + line
                pieces = self._engine.generate(text, self._params)
                self._text = text + _collect(pieces, to_stdout=True, watchers=self._watchers)
        except HybridError as error:
            say(f"{error} (/reset begins anew)")


def _collect(pieces: Generator[str, None, None], *, to_stdout: bool, watchers: Sequence[Watcher]) -> str:
    """The whole text; what was said before a Ctrl-C stays said, and the report says "cancelled"."""
    said: list[str] = []
    # closing: a Ctrl-C may come between two pieces, when no exception reaches the generator that sets the report
    try:
        with contextlib.closing(pieces), contextlib.suppress(KeyboardInterrupt):
            for piece in pieces:
                said.append(piece)
                if to_stdout:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
                for watcher in watchers:
                    watcher.look()
    finally:
        if to_stdout and (said or sys.exc_info()[0] is None):  # an error has a line of its own
            sys.stdout.write("\n")
            sys.stdout.flush()
    return "".join(said)


def _opening(system: str | None, prompt: str | None = None) -> list[Message]:
    messages = [] if system is None else [Message("system", system)]
    return messages if prompt is None else [*messages, Message("user", prompt)]


def _read_line() -> str | None:
    """One message ('' for none), or None at the end of the input. Ctrl-C, often meant for the answer, only asks."""
    try:
        if sys.stdout.isatty():
            return input(PROMPT).strip()
        click.echo(PROMPT, nl=False, err=True)  # stdout is a file, and carries only answers
        return input().strip()
    except KeyboardInterrupt:
        say("\nCtrl-D or /bye leaves.")
        return ""
    except UnicodeDecodeError:
        say("That was not UTF-8 text.")
        return ""
    except EOFError:
        say("")
        return None


def _summarise(engine: Engine, report: GenerationReport, meter: DecodeMeter) -> None:
    manifest = engine.store.manifest
    say("")
    say(f"model    {manifest.model} ({engine.config.family}), {manifest.quantization.weights}")
    say(
        f"prefill  {_computed(report)}, {report.prefill_tokens_per_s:.1f} tokens/s, "
        f"first token after {report.time_to_first_token_s:.2f} s"
    )
    say(
        f"decode   {_tokens(report.generated_tokens)}, {report.decode_tokens_per_s:.1f} tokens/s, "
        f"ended by {_ENDINGS[report.finish_reason]}"
    )
    for line in closing_lines(engine, meter.total()):
        say(line)


_ENDINGS = {
    "end": "the model",
    "stop": "a stop string",
    "length": "--max-tokens",
    "context": "a full context (--ctx)",
    "cancelled": "Ctrl-C",
}


def _computed(report: GenerationReport) -> str:
    cached = f" ({report.cached_tokens} more from the cache)" if report.cached_tokens else ""
    return _tokens(report.prompt_tokens - report.cached_tokens) + cached


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
