"""hybrid-predictors: small networks that say which neurons a token needs.

    hybrid-predictors train MODEL            from the profile that hybrid-profile left with the model
    hybrid-predictors compare MODEL          the trained ones beside those that need no training
    hybrid-predictors import MODEL FOLDER    PowerInfer's model_0.pt, model_1.pt, ...

They lie with the model's store; `--predictor trained` of hybrid-run, -bench and -eval computes what they name. The
weights carry the names of published checkpoints.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import cache_dir_option, model_options, ram_option, threads_option
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import BudgetError, UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.engine import OpenModel
    from hybrid_runtime.profiling.profile import Profile
    from hybrid_runtime.store.reader import Store
    from hybrid_runtime.stores import ModelRequest
    from hybrid_tools.predictor_training.outcome import Outcome, PredictorRequest

profile_option = click.option(
    "--profile", "profile_folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="A profile of the model. [default: the one with its store]",
)  # fmt: skip
quant_option = click.option(
    "--rows", type=click.Choice(["f32", "bf16", "q8", "q4"]), default="q4", show_default=True,
    help="How the predictors' weights are packed.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.group(name="hybrid-predictors", help="Train, import and compare predictors of a model's neurons.")
@click.version_option(__version__, prog_name="hybrid-predictors")
def command() -> None:
    """Hold the subcommands."""


def _model(subcommand: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every subcommand has."""
    for option in (json_option, cache_dir_option, model_options):
        subcommand = option(subcommand)
    return click.argument("model")(subcommand)


def _computes(subcommand: Callable[..., Any]) -> Callable[..., Any]:
    """The options of those that run the model."""
    return ram_option(threads_option(subcommand))


@command.command(
    name="train",
    help="Train predictors for MODEL (path, alias or repository id) on its profile's sample, wider and wider until all "
    "that is asked holds on the profile's held-out text.",
    context_settings={"max_content_width": 110},
)
@_model
@_computes
@profile_option
@click.option(
    "--recall", type=click.FloatRange(0.5, 0.9999), default=0.97, show_default=True, metavar="SHARE",
    help="Of the neurons that fire, how many to find.",
)  # fmt: skip
@click.option(
    "--max-named", type=click.FloatRange(1.0), default=1.6, show_default=True, metavar="RATIO",
    help="Neurons named for one that fires.",
)  # fmt: skip
@click.option(
    "--max-share", type=click.FloatRange(0.001, 1.0), default=0.1, show_default=True, metavar="SHARE",
    help="The predictors' bytes over those of the neurons.",
)  # fmt: skip
@click.option(
    "--max-loss", type=click.FloatRange(0.0), default=0.1, show_default=True, metavar="PERCENT",
    help="Increase of the perplexity on held-out text.",
)  # fmt: skip
@click.option(
    "--epochs", type=click.IntRange(1, 1000), default=16, show_default=True, metavar="N",
    help="Passes over the sample for each layer.",
)  # fmt: skip
@click.option(
    "--first-share", type=click.FloatRange(0.01, 1.0), default=0.8, show_default=True, metavar="SHARE",
    help="Of --max-share, what the first round spends: more makes fewer rounds, maybe for more bytes than needed.",
)  # fmt: skip
@quant_option
@click.option("--linear", is_flag=True, help="Without the ReLU in between, as Deja Vu's.")
@click.option("--restart", is_flag=True, help="Forget what an unfinished run has trained.")
@click.option(
    "--replace", "replaces", is_flag=True, help="Take the place also of predictors that reach more of what is asked."
)
def train(  # noqa: D103
    model: str,
    profile_folder: Path | None,
    recall: float,
    max_named: float,
    max_share: float,
    max_loss: float,
    epochs: int,
    first_share: float,
    rows: str,
    *,
    linear: bool,
    restart: bool,
    replaces: bool,
    as_json: bool,
    **options: Any,
) -> int:
    from hybrid_runtime.stores import asked_quantization  # noqa: PLC0415  # imports torch
    from hybrid_tools.predictor_training import memory, ranks  # noqa: PLC0415
    from hybrid_tools.predictor_training.outcome import PredictorRequest  # noqa: PLC0415
    from hybrid_tools.predictor_training.run import train_predictors  # noqa: PLC0415

    row_format = asked_quantization(rows, None).weights

    def training_takes(store: Store, profile: Profile, num_samples: int) -> int:
        config = store.manifest.config
        budget = max_share * ranks.ffn_bytes(config, store.manifest.quantization) * config.num_hidden_layers
        widest = ranks.widest_rank(config, row_format, profile.layers, budget)
        most = max(int(budget), ranks.least_bytes(config, row_format))
        return memory.training_bytes(config, num_samples, widest, most)

    opened, profile, folder, source = _open(model, profile_folder, options, training_takes)
    request = PredictorRequest(
        recall=recall,
        most_named=max_named,
        most_share=max_share,
        most_loss=max_loss / 100,
        row_format=row_format,
        num_epochs=epochs,
        has_relu=not linear,
        restarts=restart,
        first_share=first_share,
        replaces=replaces,
    )
    try:
        outcome = train_predictors(opened, profile, source, folder, request, say)
    except KeyboardInterrupt:
        say("\nwhat was trained of whole layers is kept; the same command goes on from there")
        raise
    _show(outcome, request, folder, as_json=as_json)
    return 0


@command.command(
    name="compare",
    help="Predictors of every kind on the held-out text of MODEL's profile: the trained ones (mlp); the gate at 4 bits "
    "(sign) and at low rank (svd), which need no training; the gate itself (exact-gate); the best possible (oracle) "
    "and blind chance (random).",
    context_settings={"max_content_width": 110},
)
@_model
@_computes
@profile_option
@click.option(
    "--recall", type=click.FloatRange(0.5, 0.9999), default=0.97, show_default=True, metavar="SHARE",
    help="Of the neurons that fire, how many sign and svd have to find.",
)  # fmt: skip
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(["mlp", "sign", "svd", "exact-gate", "oracle", "random"]),
    help="Only this one; may be repeated. [default: all]",
)  # fmt: skip
def compare(  # noqa: D103
    model: str, profile_folder: Path | None, recall: float, kinds: tuple[str, ...], *, as_json: bool, **options: Any
) -> int:
    from hybrid_runtime.engine import TrainedPredictors  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.beside import store_digest  # noqa: PLC0415
    from hybrid_runtime.store.predictor_files import has_predictors, read_header  # noqa: PLC0415
    from hybrid_tools.predictor_training.comparison import KindResult, compare_kinds  # noqa: PLC0415
    from hybrid_tools.predictor_training.memory import comparing_bytes  # noqa: PLC0415

    store = _store(model, options)
    folder = _folder(store, options)
    trained = None
    if has_predictors(folder):
        header = read_header(folder, store.manifest.config, store_digest(store))
        trained = TrainedPredictors(folder, header)
    else:
        say(f"{folder}: nobody has trained predictors yet (hybrid-predictors train), so there is no row for them")

    def comparing_takes(store: Store, _: Profile, num_samples: int) -> int:
        return comparing_bytes(
            store.manifest.config, num_samples, kinds, trained.header if trained is not None else None
        )

    opened, profile, _, source = _open(model, profile_folder, options, comparing_takes)

    def show(row: KindResult) -> None:
        if not as_json:
            click.echo(
                f"{row.kind:10}  {100 * row.share:8.1f}  {row.recall:6.4f}  {row.precision:9.4f}  "
                f"{row.named_for_one:13.2f}  {row.perplexity:10.3f}  {_percent(row.loss)} +/- "
                f"{100 * row.loss_error:.3g}"
            )

    if not as_json:
        click.echo("kind        bytes, %  recall  precision  named for one  perplexity  change, %")
    rows = compare_kinds(opened.load_sequence(), profile, source, trained, recall, show, kinds, say)
    if as_json:
        click.echo(json.dumps({"model": profile.model, "kinds": [row.to_json() for row in rows]}))
    return 0


@command.command(
    name="import",
    help="Read PowerInfer's predictors of MODEL (a dense one): FOLDER holds model_0.pt, model_1.pt, ... and maybe a "
    "config.json with sparse_threshold. Nothing in these files is run.",
    context_settings={"max_content_width": 110},
)
@_model
@click.argument("source", metavar="FOLDER", type=click.Path(path_type=Path))
@quant_option
def import_(model: str, source: Path, rows: str, *, as_json: bool, **options: Any) -> int:  # noqa: D103
    from hybrid_runtime.sizes import format_bytes  # noqa: PLC0415
    from hybrid_runtime.stores import asked_quantization  # noqa: PLC0415
    from hybrid_tools.predictor_training.importing import import_powerinfer  # noqa: PLC0415

    store = _store(model, options)
    folder = _folder(store, options)
    header = import_powerinfer(store, source, folder, asked_quantization(rows, None).weights)
    ranks = [layer.rank for layer in header.layers]
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "num_bytes": header.num_bytes, "ranks": ranks}))
    else:
        say(f"{len(ranks)} layers, ranks {min(ranks)} to {max(ranks)}, {format_bytes(header.num_bytes)}")
        click.echo(str(folder))
    return 0


def _percent(loss: float) -> str:
    """Seven characters, of which none pretend to know what nobody does."""
    return f"{100 * loss:+7.3f}" if abs(loss) < 1 else f"{100 * loss:+7.0f}"


def _open(
    model: str, profile_folder: Path | None, options: dict[str, Any], takes: Callable[[Store, Profile, int], int]
) -> tuple[OpenModel, Profile, Path, Path]:
    """The model in its exact mode, its profile, where predictors go, and where the profile lies.

    takes: bytes beside the model, from it, its profile and the number of sampled tokens; they have to fit too.
    """
    from hybrid_runtime.budget import require_memory  # noqa: PLC0415
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.engine import default_cache_dir, open_model  # noqa: PLC0415
    from hybrid_runtime.load_options import LoadOptions  # noqa: PLC0415
    from hybrid_runtime.machine import available_ram_bytes, physical_cores, usable_cores  # noqa: PLC0415
    from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER, has_profile, read_profile  # noqa: PLC0415
    from hybrid_runtime.profiling.profile_file import read_header as read_profile_header  # noqa: PLC0415
    from hybrid_runtime.store.beside import beside, store_digest  # noqa: PLC0415

    cache_dir = options["cache_dir"] or default_cache_dir()
    threads = options["threads"] or min(physical_cores(), usable_cores())
    use_threads(threads)
    store = _store(model, options)
    source = profile_folder or beside(store, cache_dir) / PROFILE_FOLDER
    if not has_profile(source):
        raise UsageError(
            f"{source}: has no profile of {store.manifest.model}; run hybrid-profile {store.folder} --text FILE"
        )
    profile = read_profile(source, store.manifest.config, store_digest(store))
    header = read_profile_header(source)
    load = LoadOptions(
        ram_bytes=options["ram"],
        spreads=False,  # training and comparing look into every bundle
        num_positions=header.window,
        threads=threads,
        cache_dir=cache_dir,
        scores=True,
        say=say,
    )
    try:
        opened = open_model(_request(model, options), load, needs_tokenizer=False)
        extra = takes(store, profile, header.num_samples)
        plan = replace(opened.memory_plan, workspace=opened.memory_plan.workspace + extra)
        require_memory(plan, options["ram"], available_ram_bytes())
    except BudgetError as error:  # in the words of this program, which has no --ctx
        raise BudgetError(
            str(error).replace("a smaller --ctx", "a profile with a smaller --window or --samples")
        ) from error
    return opened, profile, _folder(store, options), source


def _folder(store: Store, options: dict[str, Any]) -> Path:
    """Where predictors of the store lie."""
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.beside import beside  # noqa: PLC0415
    from hybrid_runtime.store.predictor_files import PREDICTOR_FOLDER  # noqa: PLC0415

    return beside(store, options["cache_dir"] or default_cache_dir()) / PREDICTOR_FOLDER


def _store(model: str, options: dict[str, Any]) -> Store:
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.stores import find_model  # noqa: PLC0415

    cache_dir = options["cache_dir"] or default_cache_dir()
    found = find_model(_request(model, options), cache_dir, console_progress(), needs_tokenizer=False)
    return found.open(console_progress(), say)


def _request(model: str, options: dict[str, Any]) -> ModelRequest:
    from hybrid_runtime.stores import ModelRequest  # noqa: PLC0415  # imports torch

    return ModelRequest(
        model,
        options["quant"],
        options["group"],
        options["ffn_activation"],
        options["revision"],
        options["offline"],
    )


def _show(outcome: Outcome, request: PredictorRequest, folder: Path, *, as_json: bool) -> None:
    total, header = outcome.total, outcome.header
    if as_json:
        values = {
            "folder": str(folder),
            "recall": total.recall,
            "precision": total.precision,
            "named_for_one": total.density_ratio,
            "predicted_density": total.predicted_density,
            "true_density": total.true_density,
            "share_of_bytes": outcome.share,
            "share_of_time": outcome.share_of_time,
            "perplexity": header.perplexity,
            "exact_perplexity": header.exact_perplexity,
            "loss": outcome.loss,
            "loss_error": outcome.loss_error,
            "misses": outcome.misses(request),
            "ranks": [layer.rank for layer in header.layers],
        }
        click.echo(json.dumps(values))
        return
    click.echo("layer  rank  recall  precision  named, %  firing, %  named for one     bytes")
    for layer_idx, (layer, quality) in enumerate(zip(header.layers, outcome.by_layer, strict=True)):
        click.echo(
            f"{layer_idx:5}  {layer.rank:4}  {quality.recall:6.4f}  {quality.precision:9.4f}  "
            f"{100 * quality.predicted_density:8.2f}  {100 * quality.true_density:9.2f}  "
            f"{quality.density_ratio:13.2f}  {layer.num_bytes:8}"
        )
    click.echo(
        f"all: recall {total.recall:.4f}, {total.density_ratio:.2f} neurons named for one that fires, "
        f"{100 * outcome.share:.1f} % of the neurons' bytes, {100 * outcome.share_of_time:.0f} % of the feed-forward "
        f"networks' time, perplexity {header.exact_perplexity:.3f} -> "
        f"{header.perplexity:.3f} ({100 * outcome.loss:+.3f} +/- {100 * outcome.loss_error:.3f} %)"
    )
    for miss in outcome.misses(request):
        say(f"not reached: {miss}; more text, more --epochs or a larger --max-share may help")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


if __name__ == "__main__":
    sys.exit(main())
