"""The display counts right, prints seldom where nobody watches, and is never asked to run backwards."""

from __future__ import annotations

import io

import pytest

from hybrid_runtime.errors import DownloadError
from hybrid_runtime.progress import PlainProgress, TerminalProgress, console_progress, format_duration
from hybrid_runtime.sizes import format_decimal_bytes


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Recorder:
    def __init__(self) -> None:
        self.totals: list[int | None] = []
        self.steps: list[int] = []
        self.ended = 0

    def start(self, label: str, total_bytes: int | None) -> None:
        self.totals.append(total_bytes)

    def advance(self, n: int) -> None:
        self.steps.append(n)

    def done(self) -> None:
        self.ended += 1


def test_plain_lines_come_at_most_every_five_seconds():
    clock, stream = Clock(), io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    progress.start("model", 1_000_000)
    for _ in range(100):
        clock.now_s += 0.11
        progress.advance(10_000)
    progress.done()
    progress.done()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "model: 1 MB"
    assert [line.split(",")[0] for line in lines[1:]] == [
        "model: 460 kB of 1 MB (46 %)",
        "model: 920 kB of 1 MB (92 %)",
        "model: 1 MB of 1 MB (100 %)",
    ]
    assert lines[1].endswith("90.9 kB/s, 0:06 left")
    assert lines[-1].endswith("90.9 kB/s, took 0:11")


def test_plain_display_without_a_total_shows_no_share():
    clock, stream = Clock(), io.StringIO()
    progress = PlainProgress(stream, clock=clock)
    progress.start("layers", None)
    clock.now_s += 6
    progress.advance(600)
    assert stream.getvalue().splitlines() == ["layers", "layers: 600 B, 100 B/s, took 0:06"]


def test_terminal_shows_label_as_text_and_bytes():
    stream = Terminal()
    progress = console_progress(stream)
    assert isinstance(progress, TerminalProgress)
    progress.start("model [red]x", 2_000_000)
    progress.advance(2_000_000)
    progress.done()
    progress.done()
    assert "[red]x" in stream.getvalue()
    assert "2.0/2.0 MB" in stream.getvalue()


def test_streams_that_are_no_terminal_get_plain_lines():
    assert isinstance(console_progress(io.StringIO()), PlainProgress)


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (5_368_709_120, "5.37 GB"), (1.036e14, "104 TB")]
)
def test_bytes_are_written_in_decimal_units(n, text):
    assert format_decimal_bytes(n) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3675, "1:01:15")])
def test_durations_are_written_as_a_clock(seconds, text):
    assert format_duration(seconds) == text


def test_download_reports_every_byte_once_in_spite_of_restarts(hub, client):
    files = client.model_files()
    hub.add(client.repo, files)
    hub.ignore_range = True
    hub.drop_after[client.shard_1] = [100_000, 200_000]
    recorder = Recorder()
    snapshot = client.get(progress=recorder)
    wanted = sum(len(files[path.name]) for path in snapshot.iterdir())
    assert recorder.totals == [wanted]
    assert sum(recorder.steps) == wanted
    assert min(recorder.steps) > 0
    assert recorder.ended == 1


def test_resumed_download_counts_what_was_there(hub, client):
    hub.add(client.repo, client.model_files())
    hub.drop_after[client.shard_1] = [200_000] + [0] * 9
    failed = Recorder()
    with pytest.raises(DownloadError):
        client.get(progress=failed)
    assert failed.ended == 1
    hub.drop_after.clear()
    recorder = Recorder()
    client.get(progress=recorder)
    assert sum(recorder.steps) == recorder.totals[0]
    assert recorder.totals[0] > 600_000 - 1
