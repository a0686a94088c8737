r"""hybrid-train: trains llama- and mixtral-shaped models from plain text, sparse ones above all.

    hybrid-train --text stories.txt.gz@4 --text classics.txt --vocab-size 4096 --experts 4 --activation drelu \
        --tokens 6M -o RUN
    hybrid-train --from SWIGLU_MODEL --relufy drelu --text stories.txt.gz --tokens 1M -o RUN

Killed at any moment, the same command goes on where it was, to the very same weights. The finished model is RUN/model,
a Hugging Face folder with TurboSparse-Mixtral's or Bamboo's names (dReLU), Mixtral's or Llama's (SwiGLU, ReLU).
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from click.core import ParameterSource

from hybrid_runtime import __version__
from hybrid_runtime.cli.program import run_program
from hybrid_runtime.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import, --help should not
    from hybrid_tools.training.recipe import FfnActivation
    from hybrid_tools.training.request import RunRequest

SHAPE_OPTIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "layers",
    "heads",
    "kv_heads",
    "experts",
    "experts_per_token",
    "rope_theta",
    "context",
    "tie_embeddings",
)
ACTIVATIONS = ("swiglu", "relu", "drelu", "fatrelu")


class Count(click.ParamType[int]):
    """A number of tokens: 500000, 500K, 6M, 1.5B."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Fail with the option's name for anything else."""
        if isinstance(value, int):
            return value
        scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(value[-1:].upper(), 0)
        try:
            number = Decimal(value[:-1] if scale else value) * (scale or 1)  # 2.01M is no whole float
        except InvalidOperation:
            self.fail(f"{value!r} is not a number of tokens such as 500K or 6M", param, ctx)
        if not number.is_finite() or not 1 <= number < 10**15 or number != int(number):
            self.fail(f"{value!r} is not a whole number of tokens above 0", param, ctx)
        return int(number)


@click.command(name="hybrid-train", help="Train or continue a llama- or mixtral-shaped model on plain text.")
@click.option(
    "--text",
    "texts",
    required=True,
    multiple=True,
    metavar="FILE[@WEIGHT]",
    help="Text, plain or .gz, documents parted by <|endoftext|>; WEIGHT: how often an epoch reads it. Repeatable.",
)
@click.option(
    "--output", "-o", "folder", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The run."
)
@click.option("--tokens", required=True, type=Count(), metavar="N", help="Tokens to train on, e.g. 6M.")
@click.option("--activation", type=click.Choice(ACTIVATIONS), help="Of a new model. [default: drelu]")
@click.option("--from", "source", metavar="MODEL", type=click.Path(path_type=Path), help="Checkpoint to continue.")
@click.option("--relufy", type=click.Choice(ACTIVATIONS[1:]), help="Replace the activation of --from, then train.")
@click.option("--fatrelu-threshold", type=float, default=0.0, metavar="T", help="fatrelu's T.")
@click.option(
    "--l1", type=float, default=0.0, show_default=True, help="Largest weight of the L1 penalty on activations."
)
@click.option("--l1-start", type=float, default=0.1, show_default=True, help="Share of the run at which it begins.")
@click.option("--l1-end", type=float, default=0.6, show_default=True, help="Share of the run at which it is largest.")
@click.option("--tokenizer", metavar="PATH", type=click.Path(path_type=Path), help="An existing one: folder or file.")
@click.option(
    "--vocab-size",
    type=click.IntRange(1, 2**24),
    default=4096,
    show_default=True,
    help="Pieces of a vocabulary of its own.",
)
@click.option("--held-out", type=float, default=0.02, show_default=True, help="Share of documents kept for testing.")
@click.option("--hidden-size", type=int, default=256, show_default=True)
@click.option("--intermediate-size", type=int, default=384, show_default=True, help="Neurons of one FFN or expert.")
@click.option("--layers", type=int, default=5, show_default=True)
@click.option("--heads", type=int, default=8, show_default=True)
@click.option("--kv-heads", type=int, default=4, show_default=True)
@click.option("--experts", type=int, default=0, show_default=True, help="0: a dense model (llama).")
@click.option("--experts-per-token", type=int, default=2, show_default=True)
@click.option("--rope-theta", type=float, default=10000.0, show_default=True)
@click.option("--context", type=int, default=2048, show_default=True, help="max_position_embeddings.")
@click.option("--tie-embeddings", is_flag=True, help="The head is the embedding.")
@click.option("--seq-len", type=int, default=256, show_default=True, help="Tokens of a training sequence.")
@click.option("--batch-tokens", type=Count(), default=4096, show_default=True, metavar="N", help="Tokens of one step.")
@click.option("--micro-batch", type=int, metavar="N", help="Sequences computed at once. [default: a whole step]")
@click.option("--lr", type=float, default=2e-3, show_default=True, help="Largest learning rate.")
@click.option("--final-lr", type=float, default=0.05, show_default=True, help="Share of --lr at the end.")
@click.option("--warmup", type=float, default=0.03, show_default=True, help="Share of the run that warms up.")
@click.option("--weight-decay", type=float, default=0.1, show_default=True)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of a step's gradient.")
@click.option("--balance", type=float, default=0.01, show_default=True, help="Weight of the experts' balancing loss.")
@click.option("--dtype", type=click.Choice(["f32", "bf16"]), default="f32", show_default=True, help="Of the products.")
@click.option(
    "--save-dtype", type=click.Choice(["bf16", "f32"]), default="bf16", show_default=True, help="Of the model."
)
@click.option(
    "--round-to",
    type=click.Choice(["q8"]),
    help="Put the model's weights on the levels of a q8 store, which then computes what the model does.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads. [default: physical cores]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--save-every", type=click.IntRange(1), default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--test-every", type=click.IntRange(1), default=200, show_default=True, help="Steps between tests.")
@click.option("--export", is_flag=True, help="Do not train on: write the model as of the newest checkpoint.")
@click.version_option(__version__, prog_name="hybrid-train")
@click.pass_context
def command(context: click.Context, /, **options: Any) -> int:
    """Parse, train, print where the model is."""
    typed = [param for param in context.command.params if _was_typed(context, param)]
    _refuse_contradictions(options, {param.name for param in typed})
    from hybrid_tools.training.display import console_display  # noqa: PLC0415  # imports torch
    from hybrid_tools.training.run import train  # noqa: PLC0415

    click.echo(str(train(_request(options, _command_line(typed, options)), console_display())))
    return 0


def _was_typed(context: click.Context, param: click.Parameter) -> bool:
    return context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE


def _command_line(typed: list[click.Parameter], options: dict[str, Any]) -> str:
    """What was typed, as it could be typed again."""
    words = ["hybrid-train"]
    for param in typed:
        value, flag = options[str(param.name)], param.opts[0]
        for each in value if isinstance(value, tuple) else (value,):
            words += [flag] if each is True else [flag, str(each)]
    return shlex.join(words)


def _refuse_contradictions(options: dict[str, Any], typed: set[str | None]) -> None:
    """Raise UsageError for options that would be ignored."""
    if not 0 <= options["held_out"] < 1:
        raise UsageError(f"--held-out {options['held_out']}: expected a share from 0 to below 1")
    if options["source"] is None:
        _refuse_for_new_model(options, typed)
    else:
        _refuse_beside_source(options, typed)
    for name in ("l1_start", "l1_end"):
        if name in typed and not options["l1"]:
            raise UsageError(f"--{name.replace('_', '-')}: there is no penalty; give --l1 too")
    if options["tokenizer"] is not None and "vocab_size" in typed:
        raise UsageError("--vocab-size: the vocabulary of --tokenizer has its own size")


def _refuse_for_new_model(options: dict[str, Any], typed: set[str | None]) -> None:
    if options["relufy"]:
        raise UsageError(f"--relufy {options['relufy']}: needs --from, the checkpoint whose activation is replaced")
    for name in ("experts_per_token", "balance"):
        if name in typed and not options["experts"]:
            raise UsageError(f"--{name.replace('_', '-')}: a dense model has no experts; give --experts too")


def _refuse_beside_source(options: dict[str, Any], typed: set[str | None]) -> None:
    if options["activation"]:
        raise UsageError("--activation is of a new model; say --relufy to replace the activation of --from")
    for name in SHAPE_OPTIONS:
        if name in typed:
            raise UsageError(f"--{name.replace('_', '-')} is of a new model; --from has its own")
    if options["fatrelu_threshold"] and not options["relufy"]:
        raise UsageError("--fatrelu-threshold: needs --relufy fatrelu")


def _request(options: dict[str, Any], command_line: str) -> RunRequest:
    import torch  # noqa: PLC0415

    from hybrid_runtime.checkpoints.open import open_checkpoint  # noqa: PLC0415
    from hybrid_runtime.machine import physical_cores  # noqa: PLC0415
    from hybrid_tools.training.documents import parse_text_file  # noqa: PLC0415
    from hybrid_tools.training.recipe import Optimisation, Shape, activation_of  # noqa: PLC0415
    from hybrid_tools.training.request import RunRequest  # noqa: PLC0415

    kind = options["relufy"] or options["activation"] or (None if options["source"] else "drelu")
    num_threads = options["threads"] or physical_cores()
    torch.set_num_threads(num_threads)
    num_sequences = max(1, options["batch_tokens"] // max(1, options["seq_len"]))
    return RunRequest(
        folder=options["folder"],
        files=tuple(parse_text_file(text) for text in options["texts"]),
        optimisation=Optimisation(
            total_tokens=options["tokens"],
            batch_tokens=options["batch_tokens"],
            seq_len=options["seq_len"],
            micro_batch=num_sequences if options["micro_batch"] is None else options["micro_batch"],
            learning_rate=options["lr"],
            final_learning_rate=options["final_lr"],
            warmup=options["warmup"],
            weight_decay=options["weight_decay"],
            clip=options["clip"],
            balance=options["balance"],
            l1=options["l1"],
            l1_start=options["l1_start"],
            l1_end=options["l1_end"],
            dtype=options["dtype"],
        ),
        shape=Shape(
            hidden_size=options["hidden_size"],
            intermediate_size=options["intermediate_size"],
            num_hidden_layers=options["layers"],
            num_attention_heads=options["heads"],
            num_key_value_heads=options["kv_heads"],
            num_experts=options["experts"],
            num_experts_per_tok=options["experts_per_token"],
            rope_theta=options["rope_theta"],
            max_position_embeddings=options["context"],
            tie_word_embeddings=options["tie_embeddings"],
        ),
        activation=None if kind is None else activation_of(cast("FfnActivation", kind), options["fatrelu_threshold"]),
        source=None if options["source"] is None else open_checkpoint(options["source"]),
        tokenizer=options["tokenizer"],
        vocab_size=options["vocab_size"],
        held_out=options["held_out"],
        seed=options["seed"],
        num_threads=num_threads,
        device=_device(options["device"]),
        save_dtype=options["save_dtype"],
        round_to=options["round_to"],
        save_every=options["save_every"],
        test_every=options["test_every"],
        exports=options["export"],
        command=command_line,
    )


def _device(asked: str) -> str:
    import torch  # noqa: PLC0415

    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise UsageError("--device cuda: torch finds no GPU here; use --device cpu")
    return "cuda" if has_gpu and asked != "cpu" else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
