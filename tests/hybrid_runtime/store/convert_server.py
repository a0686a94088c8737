"""Conversions as processes of their own that can be killed, without 3 s of imports each.

Run as a script, it imports everything once and forks for every line of JSON on stdin: {"argv", "stderr", "fault"}. The
child runs hybrid-convert's main. A fault is {"folder", "kind", "at"}: before the at-th change to the file system below
folder (open for writing, fsync, rename, remove, mkdir, rmdir) the child gets SIGKILL (kind "kill"), ENOSPC ("full") or
nothing ("none").
With a fault nothing is really synced: that costs most of the time, and no process sees the difference.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync"})


class ConvertServer:
    """The parent's side; one conversion at a time."""

    def __init__(self, scratch: Path) -> None:
        self.stderr = scratch / "stderr.txt"
        environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: object, fault: dict[str, object] | None = None) -> Running:
        request = {"argv": [str(each) for each in argv], "stderr": str(self.stderr), "fault": fault}
        pid = int(self._ask(json.dumps(request)))
        return Running(self, pid, os.pidfd_open(pid))

    def run(self, *argv: object, fault: dict[str, object] | None = None) -> int:
        """Exit code; minus the signal for a killed one."""
        return self.start(*argv, fault=fault).wait()

    def _ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Running:
    """A conversion that has started; it stays a zombie, so that its pid is nobody else's, until wait."""

    server: ConvertServer
    pid: int
    pidfd: int

    @property
    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Let it go on holding what it holds, at this very place."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)

    def wait(self) -> int:
        os.close(self.pidfd)
        return int(self.server._ask("wait"))


def _serve() -> None:
    import_module("torch").set_num_threads(1)
    import_module("hybrid_runtime.stores")
    main = import_module("hybrid_tools.convert").main
    pid = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            _, status = os.waitpid(pid, 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (pid := os.fork()) == 0:
            os._exit(_convert(main, **json.loads(line)))
        else:
            answer = pid
        print(answer, flush=True)


def _convert(main, argv, stderr, fault) -> int:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.dup2(2, 1)
    counter = _Fault(**fault) if fault else None
    if counter:
        sys.addaudithook(counter.see)
        os.fsync = lambda _: counter.see("os.fsync", (counter.folder,))
    code = main(argv)
    sys.stderr.flush()
    return code


class _Fault:
    def __init__(self, folder: str, kind: str, at: int = -1) -> None:
        self.folder, self.kind, self.at, self.seen = folder, kind, at, 0

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])
        if path.startswith("/") and not path.startswith(self.folder):  # shutil.rmtree removes by relative names
            return
        self.seen += 1
        if self.seen == self.at and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seen == self.at and self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    _serve()
