"""hybrid-run as a process: signals, closed pipes, terminals, and what --help costs."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from ..small_models import TEMPLATE, write_model  # noqa: TID252  # absolute names are the runtime's

COMMAND = [sys.executable, "-m", "hybrid_runtime.cli.run"]
ENDLESS = ("--temperature", "0", "--max-tokens", "100000", "--ctx", "20000", "--prompt", "Hello world")
PATIENCE_S = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama")
    write_model(folder / "chat", template=TEMPLATE, seed=2)
    return folder


@pytest.fixture
def start(folder):
    """Start the command on the tiny model; whatever still runs at the end of the test is killed."""
    running = []

    def start(*arguments, model="llama", environment=None, **options):
        command = [*COMMAND, "--model", str(folder / model), "--threads", "1", *arguments]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "HYBRID_CACHE_DIR": str(folder / "cache")}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, env=variables | (environment or {}), **(pipes | options)))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def read_some(stream, num_bytes=20):
    data = b""
    while len(data) < num_bytes:
        data += os.read(stream.fileno(), num_bytes)
    return data


def test_interrupt_keeps_what_was_said(start):
    process = start(*ENDLESS)
    said = read_some(process.stdout)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert (said + rest).endswith(b"\n")
    assert b"ended by Ctrl-C" in err
    assert b"memory   peak" in err
    assert b"Traceback" not in err


def test_interrupt_with_json_still_prints_the_object(start):
    process = start(*ENDLESS, "--json", "--verbose")
    err = b""
    while b"\nmemory " not in err:
        err += read_some(process.stderr, 1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE_S)
    answer = json.loads(out)
    assert process.returncode == 130
    assert answer["finish_reason"] == "cancelled"
    assert answer["generated_tokens"] > 0
    assert answer["prefill_s"] > 0


def test_interrupt_while_loading_is_quiet(start):
    process = start(*ENDLESS)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # until torch is being imported
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err


def test_reader_that_leaves_ends_the_run_without_a_complaint(start):
    process = start(*ENDLESS)
    read_some(process.stdout)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 141
    assert b"Error" not in err
    assert b"error" not in err
    assert b"Exception" not in err  # as in "Exception ignored in: <stdout>"


def test_full_disk_is_one_line(start):
    with Path("/dev/full").open("wb") as full:
        process = start(*ENDLESS, stdout=full)
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert err.splitlines()[-1] == b"hybrid-run: writing the output: No space left on device"


@pytest.mark.parametrize(("descriptor", "name"), [(0, b"stdin is closed"), (1, b"stdout is closed")])
def test_closed_descriptor_is_one_line(folder, descriptor, name):
    command = [*COMMAND, "--model", str(folder / "llama")] + (["--prompt", "a"] if descriptor else [])
    closed = "<&-" if descriptor == 0 else ">&-"
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, timeout=PATIENCE_S, check=False
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert name in result.stderr


def test_stdout_that_knows_few_characters_gets_question_marks(start):
    flags = ("--temperature", "5", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "1", "--max-tokens", "60")
    plain = start(*flags, "--prompt", "x")
    expected = plain.communicate(timeout=PATIENCE_S)[0].decode()
    process = start(*flags, "--prompt", "x", environment={"PYTHONIOENCODING": "latin-1"})
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert expected.encode("latin-1", "replace") != expected.encode("latin-1", "ignore")  # else nothing is tested
    assert out == expected.encode("latin-1", "replace")


def test_stdin_that_is_not_utf8_is_one_line(start):
    for io_encoding in ("utf-8:strict", "utf-8:surrogateescape"):
        environment = {"PYTHONIOENCODING": io_encoding}
        process = start(stdin=subprocess.PIPE, environment=environment)
        out, err = process.communicate(b"caf\xe9", timeout=PATIENCE_S)
        assert (process.returncode, out) == (2, b"")
        assert len(err.splitlines()) == 1
        assert b"UTF-8 text" in err


def test_help_is_fast_lists_units_and_loads_no_torch():
    program = (
        "import sys, time; from hybrid_runtime.cli.run import main; code = main(['--help']);"
        "assert not {'torch', 'numba', 'numpy', 'huggingface_hub'} & set(sys.modules);"
        "print(time.process_time(), code, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    cpu_s, code = result.stderr.split()
    assert code == "0"
    assert float(cpu_s) < 0.5
    for words in ("e.g. 8G", "e.g. 12G", "in tokens", "[default: 0.8]", "[default: tinystories-moe]", "at most 4096"):
        assert words in " ".join(result.stdout.split()), words


class Terminal:
    """The command on a terminal of its own, whose keys are ours; its stderr apart, in a file."""

    def __init__(self, start, errors, *arguments, **options) -> None:
        self.errors = errors
        self.master, slave = pty.openpty()
        self.shown = ""
        with errors.open("wb") as stderr:
            self.process = start(
                *arguments,
                stdin=slave,
                stdout=options.pop("stdout", slave),
                stderr=stderr,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                environment={"TERM": "dumb"},
                **options,
            )
        os.close(slave)

    def keys(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern):
        """Read until the pattern appears in what is new; return what came up to its end."""
        deadline = time.monotonic() + PATIENCE_S
        while (match := re.search(pattern, self.shown, re.DOTALL)) is None:
            assert time.monotonic() < deadline, (pattern, self.shown, self.errors.read_text())
            assert self.process.poll() is None, (pattern, self.shown, self.errors.read_text())
            if select.select([self.master], [], [], 0.1)[0]:
                self.shown += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def end(self):
        """Exit code and stderr, once the process is over."""
        code = self.process.wait(timeout=PATIENCE_S)
        os.close(self.master)
        return code, self.errors.read_text()


@pytest.fixture
def terminal(start, tmp_path):
    return lambda *arguments, **options: Terminal(start, tmp_path / "errors", *arguments, **options)


def test_conversation_at_a_terminal(terminal):
    screen = terminal("--temperature", "0", "--max-tokens", "2000", "--ctx", "4000", model="chat")
    screen.wait_for("> ")
    screen.keys("Hello\n")
    screen.wait_for(r"Hello\n.{20}")  # the echo of the keys, then an answer
    screen.keys("\x03")
    screen.wait_for(r"\n> ")  # the partial answer stays, and the next message is asked for
    screen.keys("/nonsense and\n")
    screen.wait_for(r"and\n.{20}")
    screen.keys("\x03")
    screen.wait_for(r"\n> ")
    time.sleep(0.3)  # Python's readline loses a Ctrl-C that comes in the instant when it begins to wait
    screen.keys("\x03")  # at the prompt: pressed a little late for the answer
    screen.wait_for(r"> ")
    screen.keys("/reset\n")
    screen.wait_for(r"reset\n.*> ")
    screen.keys("/bye\n")
    code, errors = screen.end()
    assert code == 0
    assert "Ctrl-D or /bye leaves" in errors
    assert "Traceback" not in errors
    assert "ended by Ctrl-C" in errors  # the summary of the last answer
    assert re.search(r"prefill +\d+ tokens? \(\d+ more from the cache\)", errors)


def test_conversation_survives_a_full_context(terminal):
    screen = terminal("--temperature", "0", "--max-tokens", "4", "--ctx", "64", model="chat")
    screen.wait_for("> ")
    screen.keys("x" * 80 + "\n")
    screen.wait_for(r"x\n.*> ")
    screen.keys("Hi\n")
    screen.wait_for(r"Hi\n.*\n> ")
    screen.keys("\x04")
    code, errors = screen.end()
    assert code == 0
    assert re.search(r"the prompt has \d+ tokens, the context holds 64", errors)
    assert "/reset begins anew" in errors
    assert "decode   4 tokens" in errors


def test_model_without_a_template_continues_what_is_typed(terminal, tmp_path):
    answers = tmp_path / "answers"
    with answers.open("wb") as file:
        screen = terminal("--temperature", "0", "--max-tokens", "3", stdout=file)
        deadline = time.monotonic() + PATIENCE_S
        while "> " not in screen.errors.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        screen.keys("Hello world\n")
        screen.keys("\x04")
        code, errors = screen.end()
    assert code == 0
    assert "no chat template" in errors
    said = answers.read_text()
    assert said.endswith("\n")
    assert "> " not in said  # stdout carries answers, the prompt is on stderr
    assert len(said) > 1


def test_json_at_a_terminal_is_refused_before_anything_is_loaded(terminal):
    screen = terminal("--json")
    code, errors = screen.end()
    assert code == 2
    assert errors.splitlines() == ["hybrid-run: --json needs a --prompt, or a prompt on stdin"]
