"""What every program of ours does around its click command: errors become one line, and the exit code says which kind.

0 done; 2 something that the user can mend; 130 interrupted; 141 nobody reads our output any more, as a shell reports
it. A traceback is a bug of ours and stays one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence

import click

from hybrid_runtime.errors import HybridError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def run_program(command: click.Command, argv: Sequence[str] | None) -> int:
    """Run the command and return the process's exit code."""
    name = command.name or "hybrid"
    # torch's threads would otherwise keep cores busy for milliseconds after each of its operations, waiting for another
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.stdout is None:
        return _refuse(name, "stdout is closed, so nothing could be shown; redirect it to a file or to /dev/null")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?' for what it cannot
    with _shown_notes(name):
        return _run(command, name, list(sys.argv[1:] if argv is None else argv))


def _run(command: click.Command, name: str, arguments: list[str]) -> int:
    try:
        # not command.main, which turns a closed pipe into exit code 1 on its own
        with command.make_context(name, arguments) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as done:  # --help, --version
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return EXIT_BAD_INPUT
    except click.ClickException as error:
        return _refuse(name, error.format_message())
    except HybridError as error:
        return _refuse(name, str(error))
    except (click.Abort, KeyboardInterrupt):
        say("")  # the terminal has written ^C
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard_output(1, 2)
        return EXIT_PIPE_CLOSED
    except OSError as error:
        if error.filename is None:  # stdout itself: what it still buffers cannot be written either
            _discard_output(1)
        return _refuse(name, f"{error.filename or 'writing the output'}: {error.strerror or error}")
    except MemoryError:
        return _refuse(name, "out of memory; use a smaller --ctx or --quant, or set --ram to be told before loading")
    return result if isinstance(result, int) else 0


def say(message: str) -> None:
    """One line for the user, on stderr: stdout carries only results."""
    click.echo(message, err=True)


@contextlib.contextmanager
def _shown_notes(name: str) -> Iterator[None]:
    """Show what the library logs (a retry, a cached copy used offline) as lines of this program."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{name}: %(message)s"))
    loggers = [logging.getLogger(package) for package in ("hybrid_runtime", "hybrid_kernels")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _refuse(name: str, message: str) -> int:
    say(f"{name}: {' '.join(message.split())}")
    return EXIT_BAD_INPUT


def _discard_output(*descriptors: int) -> None:
    """Point stdout (1) or stderr (2) at nothing: Python flushes both at exit and would complain once more."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
