"""hybrid-inspect: a page of tables and pictures about a model's neurons, experts, predictors and their places.

    hybrid-inspect MODEL -o report.html --png pictures
    hybrid-inspect MODEL --json
    hybrid-inspect --expert-popularity order.json --histograms histograms.npz -o report.html

It reads what hybrid-profile and hybrid-predictors left with the model's store, and statistics that others published. It
loads no weight, converts nothing and fetches nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import cache_dir_option, model_options
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import UsageError

if TYPE_CHECKING:  # torch takes seconds to import, --help should not
    from hybrid_runtime.store.reader import Store
    from hybrid_tools.inspection.facts import PlacementLayer, PredictorLayer, Report

TITLE = "Published statistics"  # of a page without a model
NO_PICTURES = "pictures need matplotlib: {remedy}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: str | None
    output: Path | None
    png: Path | None
    profile: Path | None
    plan: Path | None
    expert_popularity: Path | None
    histograms: Path | None
    quant: str | None
    group: int | None
    ffn_activation: str | None
    revision: str | None
    offline: bool
    cache_dir: Path | None
    as_json: bool


@click.command(
    name="hybrid-inspect",
    help="Show how sparse each layer of MODEL (path, alias or repository id) is, how few neurons do most of the "
    "firing, which experts are chosen, how good its predictors are and what lies where; from the profile that "
    "hybrid-profile left with it. Without -o, --png and --json, a summary is printed. Nothing is fetched, with or "
    "without --offline.",
    context_settings={"max_content_width": 110},
)
@click.argument("model", required=False)
@click.option(
    "--output", "-o", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="Write one HTML page, which needs no other file.",
)  # fmt: skip
@click.option(
    "--png", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Write each picture as a PNG into this folder.",
)  # fmt: skip
@click.option(
    "--profile", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="A profile of MODEL. [default: the one with its store]",
)  # fmt: skip
@click.option(
    "--plan", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="A plan of hybrid-place. [default: the newest one with the store]",
)  # fmt: skip
@click.option(
    "--expert-popularity", metavar="FILE", type=click.Path(path_type=Path),
    help="Also show a published order of experts: Fiddler's, as JSON.",
)  # fmt: skip
@click.option(
    "--histograms", metavar="FILE", type=click.Path(path_type=Path),
    help="Also show published histograms of activations: TEAL's, as .npz.",
)  # fmt: skip
@model_options
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: all of the report's numbers.")
@click.version_option(__version__, prog_name="hybrid-inspect")
def command(**options: object) -> int:
    """Parse, read, draw, print."""
    return _run(Settings(**options))  # type: ignore[arg-type]  # click has checked each against its option


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _run(settings: Settings) -> int:
    if settings.model is None and settings.expert_popularity is None and settings.histograms is None:
        raise UsageError("nothing to show: name a MODEL, or give --expert-popularity FILE or --histograms FILE")
    if settings.model is None:
        _refuse_without_model(settings)
    if settings.output is not None and not settings.output.absolute().parent.is_dir():
        raise UsageError(f"--output {settings.output}: there is no folder {settings.output.absolute().parent}")
    report = _report(settings)
    if settings.png is not None or settings.output is not None:
        _draw(settings, report)
    if settings.as_json:
        click.echo(json.dumps(report.to_json(), allow_nan=False))
    elif settings.output is None and settings.png is None:
        _summarise(report)
    return 0


def _refuse_without_model(settings: Settings) -> None:
    """Raise UsageError for an option that says something about a model."""
    given = {
        "--profile": settings.profile,
        "--plan": settings.plan,
        "--quant": settings.quant,
        "--group": settings.group,
        "--ffn-activation": settings.ffn_activation,
        "--revision": settings.revision,
    }
    for option, value in given.items():
        if value is not None:
            raise UsageError(f"{option} {value}: name the MODEL that it is of")


def _report(settings: Settings) -> Report:
    """Raise UsageError or CheckpointError naming what is missing or wrong, and what makes it."""
    from hybrid_tools.foreign_statistics import read_expert_popularity, read_histograms  # noqa: PLC0415  # torch
    from hybrid_tools.inspection.facts import Report, histogram_facts, popularity_facts  # noqa: PLC0415

    report = Report(TITLE) if settings.model is None else _model_report(settings, settings.model)
    if settings.expert_popularity is not None:
        popularity = popularity_facts(read_expert_popularity(settings.expert_popularity))
        report = replace(report, popularity=popularity)
    if settings.histograms is not None:
        report = replace(report, histograms=histogram_facts(read_histograms(settings.histograms)))
    return report


def _model_report(settings: Settings, model: str) -> Report:
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch
    from hybrid_runtime.placement.planning import PLANS_FOLDER  # noqa: PLC0415
    from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER, has_profile, read_profile  # noqa: PLC0415
    from hybrid_runtime.store.beside import beside, store_digest  # noqa: PLC0415
    from hybrid_runtime.store.predictor_files import PREDICTOR_FOLDER  # noqa: PLC0415
    from hybrid_tools.inspection.facts import Report, profile_facts  # noqa: PLC0415

    cache_dir = settings.cache_dir or default_cache_dir()
    store = _store(settings, model, cache_dir)
    folder = beside(store, cache_dir)
    source = settings.profile or folder / PROFILE_FOLDER
    if not has_profile(source):
        raise UsageError(f"{source}: has no profile of {model}; make one: hybrid-profile {model} --text FILE")
    profile = read_profile(source, store.manifest.config, store_digest(store))
    predictors, remark = _predictors(store, folder / PREDICTOR_FOLDER, model)
    placement, place_remark = _placement(store, settings.plan or _newest_plan(folder / PLANS_FOLDER), model)
    return Report(
        store.manifest.model,
        profile=profile_facts(profile),
        predictors=predictors,
        placement=placement,
        remarks=(place_remark,) if remark is None else (remark, place_remark),
    )


def _placement(store: Store, folder: Path | None, model: str) -> tuple[tuple[PlacementLayer, ...], str]:
    """What a plan puts where, and which plan that is or how to make one."""
    from hybrid_runtime.placement.plan import read_plan  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.beside import store_digest  # noqa: PLC0415
    from hybrid_tools.inspection.facts import PlacementLayer  # noqa: PLC0415

    if folder is None:
        return (), f"no plan says what lies where; make one: hybrid-place {model} --vram 8G"
    plan, _ = read_plan(folder, store.manifest.config, store_digest(store))
    layers = tuple(
        PlacementLayer(layer.layer_idx, layer.gpu_neurons, layer.ram_neurons, layer.disk_neurons, layer.merge)
        for layer in plan.layers
    )
    return layers, f"the placement is that of {folder}"


def _newest_plan(folder: Path) -> Path | None:
    """Of the plans that hybrid-place and hybrid-run left with the store."""
    from hybrid_runtime.placement.plan import PLAN  # noqa: PLC0415  # imports torch

    plans = list(folder.glob(f"*/{PLAN}"))
    return max(plans, key=lambda path: path.stat().st_mtime_ns).parent if plans else None


def _store(settings: Settings, model: str, cache_dir: Path) -> Store:
    """The store, where there is one."""
    from hybrid_runtime.progress import NoProgress  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.reader import Store  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest, find_model  # noqa: PLC0415

    request = ModelRequest(
        model, settings.quant, settings.group, settings.ffn_activation, settings.revision, offline=True
    )
    found = find_model(request, cache_dir, NoProgress(), needs_tokenizer=False)
    if not isinstance(found.source, Store):
        raise UsageError(
            f"{model}: is not converted to {found.weights} yet, so nobody can have profiled it; hybrid-profile {model} "
            "--text FILE does both"
        )
    return found.source


def _predictors(store: Store, folder: Path, model: str) -> tuple[tuple[PredictorLayer, ...], str | None]:
    """Those that were trained or imported, and a remark where there are none."""
    from hybrid_runtime.store.beside import store_digest  # noqa: PLC0415  # imports torch
    from hybrid_runtime.store.predictor_files import has_predictors, read_header  # noqa: PLC0415
    from hybrid_tools.inspection.facts import PredictorLayer  # noqa: PLC0415

    if not has_predictors(folder):
        return (), f"There are no predictors yet; hybrid-predictors train {model} makes them."
    header = read_header(folder, store.manifest.config, store_digest(store))
    layers = tuple(
        PredictorLayer(
            layer_idx,
            header.source,
            layer.rank,
            layer.recall,
            layer.precision,
            layer.predicted_density,
            layer.true_density,
            layer.num_bytes,
        )
        for layer_idx, layer in enumerate(header.layers)
    )
    return layers, None


def _draw(settings: Settings, report: Report) -> None:
    """Pictures one by one, each whole as soon as it is drawn, then the page."""
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.whole_files import write_whole  # noqa: PLC0415
    from hybrid_tools.inspection.figures import REMEDY, has_matplotlib, save_png, to_svg  # noqa: PLC0415
    from hybrid_tools.inspection.page import render_page  # noqa: PLC0415
    from hybrid_tools.inspection.pictures import pictures_of  # noqa: PLC0415

    svgs = {}
    if has_matplotlib():
        pictures = pictures_of(report)
        progress = console_progress()
        progress.start(f"drawing {report.title}", len(pictures), "pictures")
        try:
            for picture in pictures:
                figure = picture.draw()
                if settings.png is not None:
                    settings.png.mkdir(parents=True, exist_ok=True)
                    save_png(figure, settings.png / f"{picture.name}.png")
                if settings.output is not None:
                    svgs[picture.name] = to_svg(figure, picture.name)
                progress.advance(1)
        except KeyboardInterrupt:
            if settings.png is not None:
                say(f"\nthe pictures that were drawn are in {settings.png}")
            raise
        finally:
            progress.done()
    elif settings.png is not None and settings.output is None:
        raise UsageError(f"--png: {NO_PICTURES.format(remedy=REMEDY)}")
    else:
        say(NO_PICTURES.format(remedy=REMEDY))
    if settings.output is not None:
        write_whole(settings.output, render_page(report, svgs).encode())
    if not settings.as_json:
        click.echo(str(settings.output or settings.png))


def _summarise(report: Report) -> None:
    """A few lines a layer."""
    from hybrid_tools.inspection.facts import FIRING_SHARES, PAPER_SHARE  # noqa: PLC0415  # imports torch

    if (profile := report.profile) is not None:
        click.echo(
            f"{profile.model}: {profile.num_tokens} tokens, {100 * profile.zero_share:.1f} % of the values are zero"
        )
        click.echo("layer  zeros, %  80 % of firings by, %  never fired, %  spread")
        place = FIRING_SHARES.index(PAPER_SHARE)
        for layer in profile.layers:
            needed = "-" if layer.firing is None else f"{100 * layer.firing.needed[place]:.1f}"
            dead = "100.0" if layer.firing is None else f"{100 * layer.firing.dead:.1f}"
            spread = "-" if layer.spread is None else f"{layer.spread:.2f}"
            click.echo(f"{layer.layer_idx:5}  {100 * layer.zero_share:8.1f}  {needed:>21}  {dead:>14}  {spread:>6}")
    if (popularity := report.popularity) is not None:
        click.echo("layer  experts, the most popular first")
        for layer_idx, order in enumerate(popularity.order):
            click.echo(f"{layer_idx:5}  {' '.join(map(str, order))}")
    for tensor in report.histograms:
        first, last = tensor.magnitudes[0], tensor.magnitudes[-1]
        click.echo(
            f"{tensor.tensor}: {tensor.num_values} values a layer; a quarter are no larger than {first[0]:.3g} in the "
            f"first layer, {last[0]:.3g} in the last"
        )
    for remark in report.remarks:
        say(remark)


if __name__ == "__main__":
    sys.exit(main())
