"""The child process that renders chat templates: `python -P render_program.py MEMORY_BYTES OUTPUT_BYTES`.

`render_worker` runs it with a socket as standard input. It imports nothing of the engine. Three walls stand around a
template: jinja2's sandbox keeps it from Python's internals, limits on memory, output and files are set on the process,
and an alarm ends the process if a render outlives both its time limit and the parent that would have killed it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_LENGTH = struct.Struct("<Q")  # goes before each message, on both sides
_ALARM_GRACE_S = 0.5
_MESSAGE_LIMIT = 400  # characters of an error
_FAILURES = (  # what a template can make Python and jinja2 raise
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class OutputTooLongError(ValueError):
    """The text passed the limit while it was being written."""


def main(argv: list[str]) -> int:
    """Render jobs until the parent goes away."""
    memory_limit_bytes, output_limit_bytes = (int(argument) for argument in argv)
    _limit_process(memory_limit_bytes)
    with socket.socket(fileno=0) as connection:
        _send(connection, b"")  # ready
        while (job := _receive(connection)) is not None:
            _send(connection, json.dumps(_reply(json.loads(job), output_limit_bytes)).encode())
            signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _limit_process(memory_limit_bytes: int) -> None:
    # The alarm's default action ends the process in the kernel: no template can catch it, no loop in C delays it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process by leaving
    for kind, wanted in (
        (resource.RLIMIT_AS, memory_limit_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
            resource.setrlimit(kind, (limit, limit))


def _reply(job: Mapping[str, object], output_limit_bytes: int) -> Mapping[str, str]:
    template, variables = job["template"], job["variables"]
    assert isinstance(template, str)
    assert isinstance(variables, dict)
    signal.setitimer(signal.ITIMER_REAL, float(str(job["time_limit_s"])) + _ALARM_GRACE_S)
    try:
        return {"text": _limited(_compiled(template).generate(variables), output_limit_bytes)}
    except _FAILURES as error:
        return {"error": _one_line(_reason(error))}


def _limited(parts: Iterable[str], output_limit_bytes: int) -> str:
    text: list[str] = []
    length = 0
    for part in parts:
        length += len(part) if part.isascii() else len(part.encode("utf-8", "surrogatepass"))
        if length > output_limit_bytes:
            raise OutputTooLongError(f"its output is longer than the limit of {output_limit_bytes >> 20} MiB")
        text.append(part)
    return "".join(text)


def _reason(error: BaseException) -> str:
    match error:
        case jinja2.TemplateSyntaxError():
            reason = f"line {error.lineno}: syntax error: {error.message}"
        case SecurityError():
            reason = f"it does what the sandbox forbids: {error.message}"
        case jinja2.TemplateError():
            reason = error.message or type(error).__name__
        case OutputTooLongError():
            reason = str(error)
        case MemoryError():
            reason = "it needs more memory than its worker process may have"
        case RecursionError():
            reason = "it calls itself without an end"
        case _:
            reason = f"{type(error).__name__}: {error}"
    return reason


def _one_line(message: str) -> str:
    line = " ".join(message[: 10 * _MESSAGE_LIMIT].split())
    return line if len(line) <= _MESSAGE_LIMIT else f"{line[:_MESSAGE_LIMIT]} ..."


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return make_environment().from_string(template)


def make_environment() -> jinja2.Environment:
    """The environment that published templates are written for: that of transformers, but for `safe`."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    # Nothing is escaped here, so `safe` has nothing to say; jinja2's own makes a text that escapes its neighbours, and
    # official Mistral templates (`tojson|safe` between quotes) would write &#34; into the prompt.
    environment.filters["safe"] = str
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _checked_namespace
    return environment


class Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, which matters in training; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Take the body as it is."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter writes &, <, > and ' as escapes, which no model has seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005 - templates want the reader's own clock, without a zone


def _checked_namespace(*args: object, **names: object) -> Namespace:
    """A namespace without the names that lead to Python's internals."""
    namespace = Namespace(*args, **names)
    for name in dict(*args, **names):
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
    return namespace


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket) -> bytes | None:
    head = _receive_exactly(connection, _LENGTH.size)
    return None if head is None else _receive_exactly(connection, _LENGTH.unpack(head)[0])


def _receive_exactly(connection: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
