"""Where the real third-party files lie: beside the repository, never in it."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def shared_data(relative: str) -> Path:
    """A file or folder of ../shared/data; a test that needs an absent one is skipped with the reason."""
    path = SHARED_DATA / relative
    if not path.exists():
        pytest.skip(f"real data is absent: {path}")
    return path
