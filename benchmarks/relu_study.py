"""What dReLU does to a small mixture of experts: one model, trained six ways on the same tokens, measured alike.

    python benchmarks/relu_study.py train --runs DIR                                train what is missing, in turn
    python benchmarks/relu_study.py report --runs DIR -o docs/sparsity-study.json --pictures docs/pictures
    python benchmarks/relu_study.py report --run NAME=RUN ... -o FILE               any other runs of hybrid-train

The report measures the finished models on the documents that were held out: perplexity, exact zeros by layer and by
expert, how unevenly neurons fire, and the perplexity that is left when every token keeps only some of its neurons.
It prints tables in Markdown; docs/sparsity-study.md holds them.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch

from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.text.load import load_tokenizer
from hybrid_tools.train import main as train
from hybrid_tools.training.held_out import read_held_out
from hybrid_tools.training.initial import checkpoint_weights
from hybrid_tools.training.pictures import draw_frequencies, draw_losses, draw_sparsity
from hybrid_tools.training.sparsity import Firing, count_firing, losses_when_kept

SHAPE = "--hidden-size=128 --intermediate-size=256 --layers=4 --heads=4 --kv-heads=2 --experts=4 --context=256"
TOKENS = "1500K"
MORE = ("--lr", "1e-3", "--seed", "2", "--tokens", "400K")  # after the SwiGLU model's own, in another order
L1 = "0.002"
RUNS = {
    "swiglu": ("--activation", "swiglu", "--tokens", TOKENS),
    "relu": ("--activation", "relu", "--tokens", TOKENS),
    "drelu": ("--activation", "drelu", "--tokens", TOKENS),
    "drelu-l1": ("--activation", "drelu", "--l1", L1, "--tokens", TOKENS),
    "swiglu-more": ("--from", "{runs}/swiglu/model", *MORE),
    "relufied": ("--from", "{runs}/swiglu/model", "--relufy", "drelu", *MORE),
}
DATA = Path(__file__).parents[2] / "shared" / "data"
TEXTS = (  # and weights, as benchmarks/models/train.sh has them
    f"{DATA / 'text/tinystories_train_2MB.txt'}@4",
    f"{DATA / 'train/tinystories_v2_00.txt.gz'}@4",
    f"{DATA / 'train/storybooks_ccby_00.txt.gz'}@2",
    *(f"{DATA / f'train/classics_pd_{part:02d}.txt.gz'}@0.25" for part in range(6)),
)
KEPT = (1.0, 0.5, 0.2, 0.1, 0.05)
MOST_SEQUENCES = 48  # of each file: every document weighs the same for every model


@click.group()
def command() -> None:
    """Hold the subcommands."""


@command.command(name="train")
@click.option("--text", "texts", multiple=True, default=TEXTS, metavar="FILE[@WEIGHT]")
@click.option("--runs", type=click.Path(path_type=Path), required=True)
@click.option("--threads", default=1, show_default=True)
@click.argument("names", nargs=-1)
def train_all(texts: tuple[str, ...], runs: Path, threads: int, names: tuple[str, ...]) -> None:
    """Train the runs that are named, or all; a finished one is only opened."""
    text = [part for each in texts for part in ("--text", each)]
    for name in names or RUNS:
        if "--from" in RUNS[name] and not (runs / "swiglu" / "model").is_dir():
            raise click.UsageError(f"{name} continues swiglu, which is not trained yet")
        own = [part.format(runs=runs) for part in RUNS[name]]
        shape = SHAPE.split() if "--from" not in own else []
        code = train([*text, *shape, *own, "--threads", str(threads), "-o", str(runs / name)])
        if code:
            sys.exit(code)


@command.command()
@click.option("--runs", type=click.Path(path_type=Path))
@click.option("--run", "named", multiple=True, help="NAME=RUN")
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@click.option("--pictures", type=click.Path(path_type=Path))
@click.option("--sequences", default=MOST_SEQUENCES, show_default=True, help="Of each held-out file.")
def report(runs: Path | None, named: tuple[str, ...], output: Path, pictures: Path | None, sequences: int) -> None:
    """Measure, write the numbers, print the tables."""
    folders = {name: runs / name for name in RUNS} if runs else {}
    folders |= {name: Path(path) for name, _, path in (each.partition("=") for each in named)}
    firings, numbers = {}, {}
    for name, folder in folders.items():
        print(f"measuring {name}", file=sys.stderr)
        firings[name], numbers[name] = measure(folder, sequences)
    output.write_text(json.dumps(numbers, indent=1) + "\n")
    print_tables(numbers)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        stem = output.stem
        draw_losses({name: folder / "log.jsonl" for name, folder in folders.items()}, pictures / f"{stem}-losses.png")
        sparse = {name: firing for name, firing in firings.items() if firing.is_sparse}
        if sparse:
            draw_sparsity(sparse, pictures / f"{stem}-zeros.png")
            draw_frequencies(sparse, pictures / f"{stem}-frequencies.png")
    print(json.dumps(numbers))


def measure(run: Path, sequences: int) -> tuple[Firing, dict[str, Any]]:
    """One finished run on its own held-out documents."""
    checkpoint = open_checkpoint(run / "model")
    config = checkpoint.config
    weights = checkpoint_weights(checkpoint, config)
    notes = json.loads((run / "model" / "training.json").read_text())
    recipe = notes["recipe"]
    tokenizer = load_tokenizer(run / "tokenizer")
    held_out = read_held_out(run / "corpus", tokenizer, recipe["optimisation"]["seq_len"], sequences)
    with torch.inference_mode():
        firing, losses = count_firing(config, weights, held_out)
        kept = losses_when_kept(config, weights, held_out, KEPT)  # of 1.0 too: the same loss, to show that it is
    layers = range(config.num_hidden_layers)
    return firing, {
        "activation": config.activation.kind,
        "parameters": sum(weight.numel() for weight in weights.values()),
        "active_parameters": active_parameters(config, weights),
        "training_seconds": notes["training_seconds"],
        "tokens": recipe["optimisation"]["total_tokens"],
        "continues": recipe["source"] != "",
        "held_out_tokens": held_out.num_tokens,
        "perplexity": {name: math.exp(loss) for name, loss in losses.items()},
        "zeros": firing.mean_zero_share,
        "zeros_by_layer": [firing.zero_share(idx) for idx in layers],
        "zeros_by_expert": [
            [None if math.isnan(each) else each for each in firing.expert_zero_shares(idx)] for idx in layers
        ],
        "expert_shares": [(firing.rows[idx] / firing.rows[idx].sum()).tolist() for idx in layers],
        "neurons_for_80_percent": [firing.neurons_for(0.8, idx) for idx in layers] if firing.is_sparse else None,
        "never_fired": [float((firing.counts[idx] == 0).double().mean()) for idx in layers],
        "perplexity_when_kept": {f"{share:g}": math.exp(loss) for share, loss in kept.items()},
    }


def active_parameters(config: ModelConfig, weights: dict[str, torch.Tensor]) -> int:
    """Of one token: without the embedding, and with the experts that it is sent to."""
    always = [weight for name, weight in weights.items() if name != "embed_tokens" and ".experts." not in name]
    experts = sum(weight.numel() for name, weight in weights.items() if ".experts." in name)
    return sum(weight.numel() for weight in always) + (
        experts * config.num_experts_per_tok // config.num_experts if config.num_experts else 0
    )


def print_tables(numbers: dict[str, dict[str, Any]]) -> None:
    """Perplexity and zeros; what is left when neurons are dropped; by layer."""
    print(
        "\n| model | tokens | minutes | held-out perplexity | exact zeros |"
        + "".join(f" top {share:.0%} |" for share in KEPT[1:])
    )
    print("|---|---|---|---|---|" + "---|" * len(KEPT[1:]))
    for name, row in numbers.items():
        kept = row["perplexity_when_kept"]
        cells = "".join(f" {kept[f'{share:g}']:.2f} |" for share in KEPT[1:])
        tokens, perplexity, zeros = row["tokens"] / 1e6, row["perplexity"]["all"], 100 * row["zeros"]
        more = "+" if row["continues"] else ""
        minutes = row["training_seconds"] / 60
        print(f"| {name} | {more}{tokens:g}M | {minutes:.1f} | {perplexity:.2f} | {zeros:.1f} % |{cells}")
    print("\n| model | zeros by layer, % (experts) | neurons that make 80 % of the firings, % | never fired, % |")
    print("|---|---|---|---|")
    for name, row in numbers.items():
        if row["neurons_for_80_percent"] is None:
            continue
        layers = "; ".join(
            f"{100 * layer:.1f} ({', '.join('-' if each is None else f'{100 * each:.0f}' for each in experts)})"
            for layer, experts in zip(row["zeros_by_layer"], row["zeros_by_expert"], strict=True)
        )
        few = ", ".join(f"{100 * share:.0f}" for share in row["neurons_for_80_percent"])
        never = ", ".join(f"{100 * share:.0f}" for share in row["never_fired"])
        print(f"| {name} | {layers} | {few} | {never} |")


if __name__ == "__main__":
    command()
