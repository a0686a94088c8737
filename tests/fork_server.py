"""Programs as processes of their own that can be killed, without seconds of imports each.

A script that calls `serve` imports everything once and forks for every line of JSON on stdin: {"argv", "output",
"fault"}. The parent's side is ForkServer. A fault is {"folder", "kind", "at"}: before the at-th change to the file
system below folder (open for writing, fsync, rename, remove, mkdir, rmdir, chmod) the child gets SIGKILL (kind "kill"),
ENOSPC ("full") or nothing ("none"). With a fault nothing is really synced: that costs most of the time, and no process
sees the difference.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync", "os.chmod", "write"})


class ForkServer:
    """The parent's side of a script that serves; one program at a time."""

    def __init__(self, script: Path, scratch: Path) -> None:
        self.output = scratch / "output.txt"
        paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "predictors", "tools", "tests"))
        environment = os.environ | {
            "PYTHONPATH": paths,
            "TMPDIR": str(scratch),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: object, fault: dict[str, object] | None = None) -> Running:
        request = {"argv": [str(each) for each in argv], "output": str(self.output), "fault": fault}
        pid = int(self.ask(json.dumps(request)))
        return Running(self, pid, os.pidfd_open(pid))

    def run(self, *argv: object, fault: dict[str, object] | None = None) -> int:
        """Exit code; minus the signal for a killed one."""
        return self.start(*argv, fault=fault).wait()

    @property
    def lines(self) -> list[str]:
        """What the last program wrote to stderr and stdout."""
        return self.output.read_text().splitlines()

    def ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Running:
    """A program that has started; it stays a zombie, so that its pid is nobody else's, until wait."""

    server: ForkServer
    pid: int
    pidfd: int

    @property
    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def wait_for(self, is_reached: Callable[[], bool]) -> None:
        """Look until something is so; the program must not end before."""
        while not is_reached():
            assert self.is_alive, self.server.lines
            time.sleep(0.0005)

    def kill(self) -> None:
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def stop(self) -> None:
        """Let it go on holding what it holds, at this very place."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)

    def wait(self) -> int:
        os.close(self.pidfd)
        return int(self.server.ask("wait"))


class Fault:
    """The child's side: counts changes below folder, and lets the at-th go wrong."""

    def __init__(self, folder: str, kind: str, at: int = -1) -> None:
        self.folder, self.kind, self.at, self.seen = folder, kind, at, 0
        self.counts_relative = False  # shutil.rmtree removes by names that do not say where

    def install(self) -> None:
        sys.addaudithook(self.see)
        os.fsync = lambda descriptor: self.see("os.fsync", (str(Path(f"/proc/self/fd/{descriptor}").readlink()),))

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])
        if not (path.startswith(self.folder) or (self.counts_relative and not path.startswith("/"))):
            return
        self.seen += 1
        if self.seen == self.at and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seen == self.at and self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def serve(main: Callable[[Sequence[str]], int], install: Callable[[Fault], None] = Fault.install) -> None:
    """Fork for every request on stdin, and run main in the child. install: sets the request's fault up there."""
    pid = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            _, status = os.waitpid(pid, 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (pid := os.fork()) == 0:
            os._exit(_run(main, install, **json.loads(line)))
        else:
            answer = pid
        print(answer, flush=True)


def _run(main, install, argv, output, fault) -> int:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), 2)
    os.dup2(2, 1)
    if fault:
        install(Fault(**fault))
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    return code
