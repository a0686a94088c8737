"""Whether a new profile may take the place of the one that a folder has."""

from __future__ import annotations

from pathlib import Path

from hybrid_runtime.errors import CheckpointError, UsageError
from hybrid_runtime.profiling.profile_file import has_profile, read_header
from hybrid_runtime.profiling.windows import text_digest
from hybrid_runtime.shipped import SHIPPED_TEXT


def require_larger(folder: Path, model_digest: str, most_tokens: int) -> None:
    """Raise UsageError where the folder's profile counted more tokens than a new one will, at most most_tokens.

    One of another model, one that cannot be read, and one of the text that the package carries, make way.
    """
    try:
        header = read_header(folder) if has_profile(folder) else None
    except CheckpointError:
        return
    if header is None or header.model_digest != model_digest:
        return
    counted = sum(text.num_tokens for text in header.texts)
    if counted <= most_tokens or {text.sha256 for text in header.texts} == {text_digest((SHIPPED_TEXT,))}:
        return
    raise UsageError(
        f"{folder}: has a profile of {counted} tokens, which one of at most {most_tokens} would replace; --restart "
        "replaces it, -o FOLDER leaves the new one elsewhere (and --merge adds up both)"
    )
