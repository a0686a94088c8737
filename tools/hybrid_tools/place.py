"""hybrid-place: which neurons of a model go to the GPU, into memory, and stay on disk.

    hybrid-place MODEL --vram 8G --ram 12G
    hybrid-place MODEL --ram 12G --gpu rtx-4060 --what-if

It needs the model's profile (hybrid-profile), measures this machine once (hybrid-doctor shows it), and leaves the plan
with the model's store.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import Size, cache_dir_option, model_options, threads_option
from hybrid_runtime.cli.program import run_program, say
from hybrid_runtime.errors import BudgetError, UsageError

if TYPE_CHECKING:  # the engine takes seconds to import, --help should not
    from hybrid_runtime.placement.plan import Plan
    from hybrid_runtime.placement.planning import Planner
    from hybrid_runtime.store.reader import Store

MANY_NEURONS = 50_000  # that take the solver longer than somebody waits in silence
WHAT_IF_GIB = (0, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24)
CARD_ROUNDING = 1 << 29  # cards that are sold as 8 GiB have a little less


@dataclass(frozen=True, slots=True)
class Settings:
    """Every option of the command, as click parsed it."""

    model: str
    vram: int
    ram: int | None
    ctx: int | None
    kv_cache: str | None
    gpu: str | None
    predictor: str | None
    disk: bool
    what_if: bool
    png: Path | None
    profile_folder: Path | None
    output: Path | None
    threads: int | None
    cache_dir: Path | None
    quant: str | None
    group: int | None
    ffn_activation: str | None
    revision: str | None
    offline: bool
    as_json: bool


@click.command(
    name="hybrid-place",
    help="Decide which neurons of MODEL (path, alias or repository id) lie in GPU memory, in RAM and on disk, under "
    "the budgets that are given, and what speed that should come to.",
    context_settings={"max_content_width": 110},
)
@click.argument("model")
@click.option("--vram", type=Size(), default="0", show_default=True, metavar="SIZE", help="GPU memory to use, e.g. 8G.")
@click.option("--ram", type=Size(), metavar="SIZE", help="Memory of the process, e.g. 12G. [default: what is free]")
@click.option("--ctx", type=click.IntRange(1), metavar="N", help="Context in tokens. [default: as hybrid-run's]")
@click.option("--kv-cache", type=click.Choice(["f32", "f16", "q8"]), help="Keys and values. [default: as hybrid-run's]")
@click.option(
    "--gpu", metavar="NAME",
    help="Plan for a GPU that is not here, by its data sheet: rtx-4060, rtx-3060, rtx-4090, ... [default: this one]",
)  # fmt: skip
@click.option(
    "--predictor", type=click.Choice(["mask", "trained", "off", "gate"]),
    help="What decoding will use. [default: trained where there are some, else as the model was made]",
)  # fmt: skip
@click.option("--disk/--no-disk", default=True, show_default=True, help="Whether neurons may stay on disk.")
@click.option("--what-if", is_flag=True, help="Show speeds for VRAM from 0 to 24 GiB instead, and leave no plan.")
@click.option("--png", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Picture of --what-if.")
@click.option(
    "--profile", "profile_folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="A profile of the model. [default: the one with its store]",
)  # fmt: skip
@click.option(
    "--output", "-o", metavar="DIR", type=click.Path(path_type=Path, file_okay=False),
    help="Where to leave the plan. [default: with the model's store]",
)  # fmt: skip
@threads_option
@model_options
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.version_option(__version__, prog_name="hybrid-place")
def command(**options: object) -> int:
    """Parse, plan, print."""
    return _run(Settings(**options))  # type: ignore[arg-type]  # click has checked each against its option


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _run(settings: Settings) -> int:
    if settings.png is not None and not settings.what_if:
        raise UsageError("--png is the picture of --what-if; give both")
    if settings.vram and settings.what_if:
        raise UsageError("--what-if tries sizes of VRAM itself; leave --vram out")
    if settings.output is not None and settings.what_if:
        raise UsageError("--what-if leaves no plan; leave --output out")
    from hybrid_runtime.machine import available_ram_bytes, current_rss_bytes  # noqa: PLC0415  # imports torch

    planner = _planner(settings)
    ram = settings.ram if settings.ram is not None else available_ram_bytes() + current_rss_bytes()
    if planner.gpu is None and (settings.vram or settings.what_if):
        say(f"no GPU to plan for ({planner.no_gpu_reason}); --gpu NAME plans for one by its data sheet")
    config = planner.store.manifest.config
    num_neurons = config.num_hidden_layers * max(1, config.num_experts) * config.intermediate_size
    if num_neurons > MANY_NEURONS:
        say(f"placing {num_neurons} neurons, which takes some seconds ...")
    if settings.what_if:
        return _what_if(settings, planner, ram)
    from hybrid_runtime.placement.plan import save_plan  # noqa: PLC0415  # imports torch
    from hybrid_runtime.placement.planning import PLANS_FOLDER, plan_folder_name, require_vram  # noqa: PLC0415
    from hybrid_runtime.store.beside import beside  # noqa: PLC0415

    if planner.gpu is not None:
        require_vram(settings.vram, planner.gpu.name, planner.gpu.memory_bytes)
    plan, tiers = planner.plan(settings.vram, ram, allow_disk=settings.disk)
    name = plan_folder_name(
        plan.vram_bytes, plan.ram_bytes, plan.num_positions, plan.kv_dtype, plan.gpu, settings.disk, planner.conditions
    )
    folder = settings.output or beside(planner.store, _cache_dir(settings)) / PLANS_FOLDER / name
    save_plan(folder, plan, tiers)
    if settings.as_json:
        click.echo(json.dumps(asdict(plan) | {"folder": str(folder), "tokens_per_s": plan.tokens_per_s}))
        return 0
    for line in _lines(plan):
        click.echo(line)
    click.echo(str(folder))
    return 0


def _planner(settings: Settings) -> Planner:
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.engine import (  # noqa: PLC0415
        choose_num_positions,
        default_threads,
        find_predictors,
    )
    from hybrid_runtime.placement.planning import make_planner  # noqa: PLC0415
    from hybrid_runtime.profiling.profile_file import PROFILE_FOLDER, has_profile  # noqa: PLC0415
    from hybrid_runtime.progress import console_progress  # noqa: PLC0415
    from hybrid_runtime.speeds.machine_speeds import speed_now  # noqa: PLC0415
    from hybrid_runtime.store.beside import beside  # noqa: PLC0415
    from hybrid_runtime.store.predictor_files import PREDICTOR_FOLDER, has_predictors  # noqa: PLC0415
    from hybrid_runtime.stores import ModelRequest, find_model  # noqa: PLC0415

    cache_dir = _cache_dir(settings)
    request = ModelRequest(
        settings.model, settings.quant, settings.group, settings.ffn_activation, settings.revision, settings.offline
    )
    store: Store = find_model(request, cache_dir, console_progress(), needs_tokenizer=False).open(
        console_progress(), say
    )
    source = settings.profile_folder or beside(store, cache_dir) / PROFILE_FOLDER
    if not has_profile(source):
        raise UsageError(
            f"{source}: has no profile of {store.manifest.model}; run hybrid-profile {store.folder} --text FILE"
        )
    threads = settings.threads or default_threads(store.num_bytes)
    use_threads(threads)
    trained = None
    wants_trained = settings.predictor == "trained"
    if wants_trained or (settings.predictor is None and has_predictors(beside(store, cache_dir) / PREDICTOR_FOLDER)):
        trained = find_predictors(store, cache_dir).header
    weights = store.manifest.quantization.weights
    planner = make_planner(
        store,
        source,
        trained,
        mode=None if wants_trained else settings.predictor,  # type: ignore[arg-type]  # click offers only these
        num_positions=choose_num_positions(store.manifest.config, settings.ctx),
        kv_dtype=settings.kv_cache or ("f32" if weights.kind == "f32" else "f16"),  # type: ignore[arg-type]
        num_threads=threads,
        gpu_name=settings.gpu,
        cache_dir=cache_dir,
        say=say,
    )
    if (line := speed_now(planner.speeds)) is not None:
        say(line)
    return planner


def _cache_dir(settings: Settings) -> Path:
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415  # imports torch

    return settings.cache_dir or default_cache_dir()


def _lines(plan: Plan) -> Iterator[str]:
    from hybrid_runtime.sizes import format_bytes  # noqa: PLC0415

    yield f"{plan.model}: {plan.tokens_per_s:.2f} tokens/s predicted, {1e3 * plan.total_s:.2f} ms a token"
    gpu = plan.gpu if plan.vram_bytes else "none"
    yield (
        f"GPU: {gpu}; context {plan.num_positions} tokens, of which a token looks back on {plan.mean_length:.0f}; "
        f"keys and values in {plan.kv_dtype}"
    )
    yield ""
    yield "device         total          used          free"
    disk = f"disk                    {format_bytes(plan.disk_used_bytes):>14}"
    for device, total, used in (
        ("VRAM", plan.vram_bytes, plan.vram_used_bytes),
        ("RAM", plan.ram_bytes, plan.ram_used_bytes),
    ):
        yield f"{device:6} {format_bytes(total):>13} {format_bytes(used):>13} {format_bytes(total - used):>13}"
    yield disk
    yield ""
    yield "part         where         bytes  ms a token"
    for part in plan.parts:
        yield f"{part.kind:12} {part.device:4} {format_bytes(part.num_bytes):>14} {1e3 * part.seconds:11.3f}"
    seconds = f"{1e3 * plan.neurons_s:11.3f}"  # of all tiers, since some work at the same time
    for name, device, num_bytes in _beside_parts(plan):
        if num_bytes:
            yield f"{name:12} {device:4} {format_bytes(num_bytes):>14}"
    for tier, num_bytes in plan.neuron_bytes.items():
        if num_bytes:
            yield f"{'neurons':12} {tier:4} {format_bytes(num_bytes):>14} {seconds}"
            seconds = ""
    yield ""
    yield "layer  merge       gpu      ram     disk   CPU ms   GPU ms  sync ms"
    for layer in plan.layers:
        yield (
            f"{layer.layer_idx:5}  {layer.merge:6} {layer.gpu_neurons:8} {layer.ram_neurons:8} {layer.disk_neurons:8} "
            f"{1e3 * layer.cpu_s:8.3f} {1e3 * layer.gpu_s:8.3f} {1e3 * layer.sync_s:8.3f}"
        )
    yield ""
    greedy = "found none"
    if plan.greedy_s is not None:
        more = plan.greedy_s / plan.neurons_s - 1 if plan.neurons_s else 0.0
        greedy = f"{1e3 * plan.greedy_s:.3f} ms, {max(0.0, 100 * more):.2f} % more"
    yield (
        f"solved in {plan.solve_s:.2f} s ({plan.solver}): neurons {1e3 * plan.neurons_s:.3f} ms, of which a better "
        f"placement would save at most {100 * plan.gap:.2f} %; greedy: {greedy}"
    )


def _beside_parts(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """What memory goes to that is no part of the model: name, device, bytes."""

    def rest(used: int, device: str) -> int:
        return used - sum(part.num_bytes for part in plan.parts if part.device == device) - plan.neuron_bytes[device]

    yield "CUDA's own", "gpu", rest(plan.vram_used_bytes, "gpu")
    yield "disk's cache", "ram", plan.cache_bytes
    yield "program", "ram", rest(plan.ram_used_bytes, "ram") - plan.cache_bytes


def _what_if(settings: Settings, planner: Planner, ram: int) -> int:
    rows: list[dict[str, float | None]] = []
    last_error: BudgetError | None = None
    if not settings.as_json:
        click.echo("VRAM, GiB  tokens/s  ms a token  neurons in VRAM, %  on disk, %")
    card = planner.gpu.memory_bytes if planner.gpu is not None else 0
    for gib in WHAT_IF_GIB if planner.gpu is not None else WHAT_IF_GIB[:1]:
        try:
            plan, _ = planner.plan(gib << 30, ram, allow_disk=settings.disk)
        except BudgetError as error:
            say(f"{gib} GiB: {error}")
            last_error = error
            rows.append({"vram_gib": gib, "tokens_per_s": None})
            continue
        total = sum(layer.gpu_neurons + layer.ram_neurons + layer.disk_neurons for layer in plan.layers)
        hot = 100 * sum(layer.gpu_neurons for layer in plan.layers) / total
        on_disk = 100 * sum(layer.disk_neurons for layer in plan.layers) / total
        beyond = "  more than the card has" if gib << 30 > card + CARD_ROUNDING else ""
        rows.append({"vram_gib": gib, "tokens_per_s": plan.tokens_per_s, "hot": hot, "on_disk": on_disk})
        if not settings.as_json:
            click.echo(
                f"{gib:9}  {plan.tokens_per_s:8.2f}  {1e3 * plan.total_s:10.2f}  {hot:18.1f}  {on_disk:10.1f}{beyond}"
            )
    if settings.as_json:
        click.echo(json.dumps({"model": planner.store.manifest.model, "rows": rows}))
    if last_error is not None and all(row["tokens_per_s"] is None for row in rows):
        raise BudgetError(f"none of these sizes is enough; the last: {last_error}")
    if settings.png is not None:
        _draw(settings.png, planner, rows)
    return 0


def _draw(picture: Path, planner: Planner, rows: Sequence[dict[str, float | None]]) -> None:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # not pyplot, which has a global state and a window
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'hybrid-runtime[plots]'") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    possible = [(row["vram_gib"] or 0, speed) for row in rows if (speed := row["tokens_per_s"]) is not None]
    axes.plot([gib for gib, _ in possible], [speed for _, speed in possible], marker="o")
    gpu = planner.gpu.name if planner.gpu is not None else "no GPU"
    axes.set(
        title=f"{planner.store.manifest.model}, {gpu}: predicted", xlabel="VRAM, GiB", ylabel="tokens/s", ylim=(0, None)
    )
    axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(picture, dpi=110)
    except ValueError as error:  # matplotlib knows kinds of pictures by the name's ending
        raise UsageError(f"--png {picture}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
