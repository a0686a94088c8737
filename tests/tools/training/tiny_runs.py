"""A corpus of nonsense that takes a moment to learn, and hybrid-train over it with the smallest sizes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_tools.train import main

WORDS = [
    "cat",
    "dog",
    "sun",
    "ran",
    "big",
    "red",
    "the",
    "a",
    "to",
    "and",
    "was",
    "happy",
    "Lily",
    "Tom",
    "ball",
    "7",
    ".",
]
SIZES = (
    "--vocab-size=300",
    "--hidden-size=32",
    "--heads=4",
    "--kv-heads=2",
    "--layers=2",
    "--intermediate-size=48",
    "--experts=4",
    "--seq-len=32",
    "--context=64",
    "--batch-tokens=128",
    "--held-out=0.1",
    "--threads=1",
    "--device=cpu",
)


def write_corpus_text(path: Path, num_documents: int = 120, seed: int = 1) -> Path:
    """Documents of 10 to 60 words."""
    choose = random.Random(seed)
    documents = (" ".join(choose.choices(WORDS, k=choose.randint(10, 60))) for _ in range(num_documents))
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


def arguments(text: Path, run: Path, *options: str, tokens: int = 2560, sizes: Sequence[str] = SIZES):
    return [f"--text={text}", *sizes, f"--tokens={tokens}", f"--output={run}", *options]


def train(text: Path, run: Path, *options: str, **keywords: object) -> int:
    """The command in this process; its exit code."""
    return main(arguments(text, run, *options, **keywords))


def start(text: Path, run: Path, *options: str, **keywords: object) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hybrid_tools.train", *arguments(text, run, *options, **keywords)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def environment() -> dict[str, str]:
    root = Path(__file__).parents[3]
    paths = [str(root / folder) for folder in (".", "kernels", "predictors", "tools")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
