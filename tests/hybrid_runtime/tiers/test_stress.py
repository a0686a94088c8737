"""Decoding that is killed at any moment leaves nothing behind; decoding that goes on for long does not grow.

HYBRID_STRESS_TIMES asks for more kills, and HYBRID_STRESS_TOKENS for more tokens, than run every time; before a
release, 200 and 10 000.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

FOLDER = Path(__file__).parent
TIMES = int(os.environ.get("HYBRID_STRESS_TIMES", "4"))
NUM_TOKENS = int(os.environ.get("HYBRID_STRESS_TOKENS", "1500"))
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at Linux's counts of locked memory and reads")


def start(num_tokens=0):
    command = [sys.executable, str(FOLDER / "stress_decoding.py"), str(FOLDER), str(num_tokens)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def status_bytes(pid, name):
    """Of one process; 0 also where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields.get(name, "0 kB").split()[0]) << 10
    return 0


def all_locked_bytes():
    """Of the whole machine."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Mlocked"].split()[0]) << 10


def lockers_bytes():
    """Of memory that is there, of those who have locked some: a supervisor that locks all that it gets, say."""
    return sum(status_bytes(pid, "VmRSS") for pid in psutil.pids() if status_bytes(pid, "VmLck"))


def is_in_group(process, group):
    try:
        return os.getpgid(process.pid) == group
    except ProcessLookupError:
        return False


@pytest.mark.timeout(60 + 20 * TIMES)
def test_killed_at_any_moment_it_leaves_nothing_behind():
    chance, locked, lockers = random.Random(1), all_locked_bytes(), lockers_bytes()
    for idx in range(TIMES):
        process = start()
        time.sleep(chance.uniform(0, 0.3))
        assert status_bytes(process.pid, "VmLck") == 0
        sent = signal.SIGKILL if idx % 2 else signal.SIGINT
        process.send_signal(sent)
        process.communicate(timeout=10)
        assert process.returncode in (-sent, 1), "Ctrl-C ends Python with a KeyboardInterrupt"
        left = [each for each in psutil.process_iter() if is_in_group(each, process.pid)]
        assert not left, "no orphan"
    more = all_locked_bytes() - locked
    assert min(more, more - (lockers_bytes() - lockers)) < 64 * mmap.PAGESIZE, "none that is nobody's"


def test_it_does_not_grow():
    process = start(NUM_TOKENS)
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    before, after, misses = map(int, output.split())
    assert misses > NUM_TOKENS, "the disk was read all the time"
    assert after <= 1.01 * before
