"""How a tokenizer lies in a store: the vocabulary's own file, and one small JSON file with what that does not say.

`hybrid_tokenizer.json` is written last, so a folder that has it is complete. It replaces the many files a checkpoint
spreads the same facts over (tokenizer_config.json, added_tokens.json, generation_config.json, ...).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hybrid_runtime.whole_files import write_whole

SETTINGS_FILE = "hybrid_tokenizer.json"
FORMAT_VERSION = 1


def write_saved_tokenizer(folder: Path, files: Mapping[str, bytes], settings: Mapping[str, object]) -> None:
    """Write the vocabulary's files, then the settings that make them a saved tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_whole(folder / name, data)
    content = {"format": "hybrid-tokenizer", "version": FORMAT_VERSION, **settings}
    write_whole(folder / SETTINGS_FILE, json.dumps(content, ensure_ascii=False, indent=1).encode())
