"""hybrid-train in processes of its own that can be killed, without seconds of imports each.

Run as a script, it imports everything once and forks for every line of JSON on stdin: {"argv", "output", "fault"}. The
child runs hybrid-train's main. A fault is {"folder", "kind", "at"}: before the at-th change to the file system below
folder the child gets SIGKILL (kind "kill"), ENOSPC ("full") or nothing ("none"). What safetensors writes is a change
too, and then half of it is there.
No picture is drawn at the end, and with a fault nothing is really synced: both cost most of the time. Pictures have
tests of their own.
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
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

CHANGES = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync", "os.chmod", "write"})


class TrainServer:
    """The parent's side; one run at a time."""

    def __init__(self, scratch: Path) -> None:
        self._output = scratch / "output.txt"
        root = Path(__file__).parents[3]
        paths = os.pathsep.join(str(root / folder) for folder in (".", "kernels", "predictors", "tools"))
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, argv: list[str], fault: dict[str, object] | None = None) -> Running:
        request = {"argv": argv, "output": str(self._output), "fault": fault}
        pid = int(self.ask(json.dumps(request)))
        return Running(self, pid, os.pidfd_open(pid))

    def run(self, argv: list[str], fault: dict[str, object] | None = None) -> int:
        """Exit code; minus the signal for a killed one."""
        return self.start(argv, fault).wait()

    @property
    def lines(self) -> list[str]:
        """What the last run wrote to stderr, and to stdout at its end."""
        return self._output.read_text().splitlines()

    def ask(self, line: str) -> str:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


@dataclass(frozen=True, slots=True)
class Running:
    """A run that has started; it stays a zombie, so that its pid is nobody else's, until wait."""

    server: TrainServer
    pid: int
    pidfd: int

    @property
    def is_alive(self) -> bool:
        return not select.select([self.pidfd], [], [], 0)[0]

    def wait_for(self, is_reached) -> None:
        """Look until something is so; the run must not end before."""
        while not is_reached():
            assert self.is_alive, self.server.lines
            time.sleep(0.0005)

    def send(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        os.close(self.pidfd)
        return int(self.server.ask("wait"))


def _serve() -> None:
    import_module("torch").set_num_threads(1)
    for module in ("torch._dynamo", "sentencepiece", "hybrid_tools.training.display"):  # an optimiser imports the first
        import_module(module)
    import_module("hybrid_tools.training.run").draw_run = lambda log, picture: None
    main = import_module("hybrid_tools.train").main
    pid = 0
    for line in sys.stdin:
        if line.strip() == "wait":
            _, status = os.waitpid(pid, 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (pid := os.fork()) == 0:
            os._exit(_train(main, **json.loads(line)))
        else:
            answer = pid
        print(answer, flush=True)


def _train(main, argv, output, fault) -> int:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), 2)
    os.dup2(2, 1)
    if fault:
        _Fault(**fault).install()
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    return code


class _Fault:
    def __init__(self, folder: str, kind: str, at: int = -1) -> None:
        self.folder, self.kind, self.at, self.seen = folder, kind, at, 0

    def install(self) -> None:
        checkpoint = import_module("hybrid_tools.training.checkpoint")
        save_whole = checkpoint.save_file

        def save_half_first(tensors, path, metadata):
            save_whole(tensors, path, metadata)
            data = Path(path).read_bytes()
            os.truncate(path, len(data) // 2)
            self.see("write", (path,))
            with open(os.open(path, os.O_WRONLY), "wb", closefd=True) as file:  # noqa: PTH123  # a descriptor
                file.write(data)

        checkpoint.save_file = save_half_first
        sys.addaudithook(self.see)
        os.fsync = lambda descriptor: self.see("os.fsync", (Path(f"/proc/self/fd/{descriptor}").readlink(),))

    def see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = str(arguments[0])
        if not path.startswith(self.folder):
            return
        self.seen += 1
        if self.seen == self.at and self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seen == self.at and self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


if __name__ == "__main__":
    _serve()
