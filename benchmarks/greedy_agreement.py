"""How often a model's greedy text is the same in two kinds of weights, on beginnings of stories that it never saw.

    python benchmarks/greedy_agreement.py benchmarks/models/tinystories-moe

Prompts are the first words of the held-out documents of the text files, in order. The last line has the count.
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import click

from hybrid_runtime.engine import Engine
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.stores import ModelRequest
from hybrid_tools.training.documents import is_held_out, read_documents

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = (DATA / "text/tinystories_train_2MB.txt", DATA / "train/tinystories_v2_00.txt.gz")
HELD_OUT_SHARE = 0.02  # hybrid-train's default


@click.command()
@click.argument("model")
@click.option("--text", "texts", multiple=True, default=TEXTS, type=click.Path(path_type=Path))
@click.option("--kinds", default="f32,q8", show_default=True, help="Of weights: the exact one first.")
@click.option("--prompts", default=100, show_default=True, help="At most so many.")
@click.option("--words", default=8, show_default=True, help="Of a prompt.")
@click.option("--tokens", default=64, show_default=True, help="Of each text.")
def main(model: str, texts: tuple[Path, ...], kinds: str, prompts: int, words: int, tokens: int) -> None:
    """Compare, print a line a prompt and the count."""
    held_out = (text for file in texts for text in read_documents(file) if is_held_out(text, HELD_OUT_SHARE))
    beginnings = [" ".join(text.split()[:words]) for text in islice(held_out, prompts)]
    params = SamplingParams(temperature=0, max_tokens=tokens)
    written = []
    with tempfile.TemporaryDirectory() as cache:
        options = LoadOptions(num_positions=4 * words + tokens, cache_dir=Path(cache))
        for kind in kinds.split(","):
            engine = Engine.load(ModelRequest(model, kind), options)
            written.append(["".join(engine.generate(beginning, params)) for beginning in beginnings])
    same = [len(set(versions)) == 1 for versions in zip(*written, strict=True)]
    for beginning, is_same in zip(beginnings, same, strict=True):
        print("same     " if is_same else "different", beginning)
    print(f"{kinds}: {sum(same)} of {len(same)} texts of {tokens} tokens are the same")


if __name__ == "__main__":
    main()
