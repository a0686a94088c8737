"""The parent's side of template rendering: one child process that renders, and is killed when it takes too long.

The child (`render_program`) is started at the first job and kept. It reads jobs from a socket that is its standard
input, so it ends when this process does; while it renders, an alarm set in the kernel ends it even if nobody is left
to kill it.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from hybrid_runtime.errors import TemplateError

MEMORY_LIMIT_BYTES = 512 << 20
OUTPUT_LIMIT_BYTES = 4 << 20
_JOB_LIMIT_BYTES = 64 << 20
_LENGTH = struct.Struct("<Q")  # goes before each message, on both sides
_START_LIMIT_S = 30.0  # Python and jinja2 load in 0.1 s, on an overloaded machine in several
_REPLY_LIMIT_BYTES = 7 * OUTPUT_LIMIT_BYTES  # as JSON a byte takes at most six characters
_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TZ")  # and no tokens or keys


@dataclass(frozen=True, slots=True)
class _Child:
    """A running worker process and our end of its socket."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


class RenderWorker:
    """Renders one job at a time, in a child process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._finalizer: weakref.finalize[..., RenderWorker] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._child.process.pid if self._child else None

    def render(self, job: bytes, *, time_limit_s: float) -> str:
        """The rendered text of a job; the time limit counts from when a worker stands ready."""
        if len(job) > _JOB_LIMIT_BYTES:
            raise TemplateError(
                f"the messages take {len(job)} bytes as JSON; the limit for a chat template is {_JOB_LIMIT_BYTES} bytes"
            )
        with self._lock:
            child = self._ready_child()
            try:
                reply = _exchange(child.connection, job, deadline=time.monotonic() + time_limit_s)
            except TimeoutError:
                self._stop()
                raise TemplateError(
                    f"the chat template ran longer than its time limit of {time_limit_s:g} s and was stopped; "
                    "check the template, or raise the limit"
                ) from None
            except (OSError, EOFError):
                self._stop()
                raise TemplateError(
                    "the chat template ended its worker process, as one does that needs more than the memory limit "
                    f"of {MEMORY_LIMIT_BYTES >> 20} MiB; check the template"
                ) from None
            except BaseException:
                self._stop()  # an interrupt leaves half a message in the socket
                raise
        return _text_of(reply)

    def close(self) -> None:
        """End the child process, if there is one."""
        with self._lock:
            self._stop()

    def _ready_child(self) -> _Child:
        # After a fork, the child is not ours and counts as ended: two users would mix their messages in its socket.
        if self._child and self._child.process.poll() is not None:
            self._stop()
        if self._child is None:
            self._child = _start_child()
            self._finalizer = weakref.finalize(self, _end_child, self._child)
        return self._child

    def _stop(self) -> None:
        if self._finalizer:
            self._finalizer()
        self._child = None
        self._finalizer = None


def _start_child() -> _Child:
    ours, theirs = socket.socketpair()
    program = Path(__file__).with_name("render_program.py")
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and program
            # -P: the names of the modules beside it must not hide the libraries'
            [sys.executable, "-P", str(program), str(MEMORY_LIMIT_BYTES), str(OUTPUT_LIMIT_BYTES)],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
    child = _Child(process, ours)
    try:
        _receive(ours, deadline=time.monotonic() + _START_LIMIT_S, limit=0)  # an empty message: it is ready
    except (OSError, EOFError) as error:
        _end_child(child)
        raise TemplateError(
            f"the process that renders chat templates did not start ({sys.executable} {program}): "
            f"{error or 'it ended at once'}; check that this Python can import jinja2"
        ) from error
    except BaseException:
        _end_child(child)
        raise
    return child


def _end_child(child: _Child) -> None:
    child.connection.close()
    child.process.kill()  # nothing in a forked process, whose child it is not
    child.process.wait()


def _exchange(connection: socket.socket, job: bytes, *, deadline: float) -> bytes:
    connection.settimeout(_left(deadline))
    connection.sendall(_LENGTH.pack(len(job)) + job)
    return _receive(connection, deadline=deadline, limit=_REPLY_LIMIT_BYTES)


def _receive(connection: socket.socket, *, deadline: float, limit: int) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size, deadline=deadline))
    if length > limit:
        raise EOFError(f"a reply of {length} bytes is no reply")
    return _receive_exactly(connection, length, deadline=deadline)


def _receive_exactly(connection: socket.socket, count: int, *, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < count:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _text_of(reply: bytes) -> str:
    content = json.loads(reply)
    if "error" in content:
        raise TemplateError(f"the chat template failed: {content['error']}")
    return str(content["text"])
