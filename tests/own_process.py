"""Tests that need a process of their own: of Triton's interpreter, or of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_tests(file: Path, timeout_s: float, **environment: str) -> str:
    """What pytest printed for the file, all of whose tests have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INT"))}
    done = subprocess.run(
        command,
        check=False,
        cwd=Path(__file__).parents[1],
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert " passed" in done.stdout
    return done.stdout
