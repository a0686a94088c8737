"""A sound model, and the command run on what is wrong: it must refuse in one line, soon, and leave nothing behind."""

import contextlib
import io
import shutil
import time
from pathlib import Path

import pytest

from hybrid_runtime.cli.run import main
from hybrid_runtime.machine import current_rss_bytes, peak_rss_bytes

from ..small_models import write_model  # noqa: TID252  # absolute names are the runtime's

MOST_CPU_S = 2.0
MOST_RSS_BYTES = 500 << 20
PROGRAM_BYTES = 300 << 20  # what the command alone takes, as test_run_process's runs show; pytest takes more


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sound") / "model", num_shards=3)


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run the command; check that it refuses as it should; return the line."""

    def refused(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers: names must be refused without asking
        cache = tmp_path / "cache"
        reset_peak()
        before_bytes, started_s = current_rss_bytes(), time.process_time()
        code = main(["--cache-dir", str(cache), "--threads", "1", "--max-tokens", "2", *arguments])
        cpu_s, grown_bytes = time.process_time() - started_s, peak_rss_bytes() - before_bytes
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if not line.startswith(("no --model given", "converting"))]
        assert code == 2, captured
        assert captured.out == ""
        assert len(lines) == 1, lines
        assert lines[0].startswith("hybrid-run: ")
        assert "Traceback" not in captured.err
        assert cpu_s < MOST_CPU_S
        assert grown_bytes < MOST_RSS_BYTES - PROGRAM_BYTES
        left = [path.name for path in cache.rglob("*") if path.is_file()]
        assert set(left) <= {".lock"}  # of a failed conversion; others may be waiting for it
        assert list(tmp_path.glob("*.tmp")) == []
        return lines[0]

    return refused


def reset_peak():
    with contextlib.suppress(OSError):  # where it cannot be reset the check above is only weaker
        Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def broken(sound, tmp_path):
    """A copy of the sound model, to be broken."""
    return Path(shutil.copytree(sound, tmp_path / "model"))
