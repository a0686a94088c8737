"""A model on a GPU and the CPU at once: tokens a second, against simpler ways to share it out and against bandwidths.

    hybrid-synth --like turbosparse-mixtral -o STORE
    python benchmarks/hybrid.py STORE --vram 8G [-o benchmarks/results/hybrid-....json]

Needs an NVIDIA GPU, and some ten minutes with the 27 GB shape. The default model's logits are compared with the CPU's
first: where they differ, the program ends and reports no figure. Every way runs in its own process, on random tokens:

    hybrid     as planned for --vram and --ram
    eager      the same without CUDA graphs
    cpu        all on the CPU
    layers     whole layers on the GPU, as many as fit, the others on the CPU (llama.cpp's -ngl)
    experts    attention on the GPU, all neurons on the CPU (llama.cpp's --n-cpu-moe)
    gpu        all on the GPU, where it holds the model

`layers` and `experts` need RAM for all that is not on the GPU. The roofline is what the bytes that a token reads take
at the measured bandwidths: what is dense there first, then both sides' neurons at the same time. With --llama-bench
PATH and --gguf FILE, llama.cpp's benchmark of a build with CUDA runs too (--llama-args "-ncmoe 24").
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch

from hybrid_kernels.tiers.layout import GPU, RAM
from hybrid_runtime.cli.options import Size
from hybrid_runtime.engine import Engine, OpenModel, default_cache_dir, open_model
from hybrid_runtime.errors import HybridError
from hybrid_runtime.generation.meter import DecodeMeter
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.gpu.use import find_device
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import describe_machine, peak_rss_bytes
from hybrid_runtime.placement.parts import model_parts
from hybrid_runtime.placement.plan import Plan, PlanLayer
from hybrid_runtime.shipped import DEFAULT_MODEL
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds, machine_speeds
from hybrid_runtime.spreading import Spread
from hybrid_runtime.stores import ModelRequest

Way = Literal["hybrid", "eager", "cpu", "layers", "experts", "gpu"]
WAYS: tuple[Way, ...] = get_args(Way)
CHECKED_TOKENS = 24
MOST_DIFFERENT = 0.05  # of the logits' norm, the median over tokens: sides round activations differently
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """Of one way; per token but for the peaks. host_us: what the host does for a layer beside its neurons and waiting:
    launches, marks and small copies.
    """

    way: str
    how: str
    tokens_per_s: float
    slowest_tenth: float
    cpu_s: float
    wait_for_gpu_s: float
    wait_for_disk_s: float
    hot_share: float
    host_us: float
    cpu_bytes: float
    gpu_bytes: float
    roofline_tokens_per_s: float
    ram_peak_bytes: int
    vram_peak_bytes: int
    vram_planned_bytes: int


def check() -> None:
    """The default model, half of it on the GPU, says what it says on the CPU. Raises SystemExit where it does not."""
    ids = torch.randint(0, 4000, (CHECKED_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    for vram in (0, 700 << 20):
        engine = Engine.load(DEFAULT_MODEL, LoadOptions(num_positions=64, vram_bytes=vram))
        found[vram] = torch.stack([engine.sequence.step(token) for token in ids])
    on_cpu, on_both = found.values()
    difference = float(((on_both - on_cpu).norm(dim=1) / on_cpu.norm(dim=1)).median())
    click.echo(f"check: the default model's logits differ by {difference:.4f} of their norm (median of tokens)")
    if not difference <= MOST_DIFFERENT:
        raise SystemExit(f"more than {MOST_DIFFERENT}: the GPU computes something else; no figures")


def measure(way: Way, store: str, vram: int, ram: int | None, tokens: int, cache_dir: Path, num_positions: int) -> Row:
    """Decode random tokens; the first quarter warms caches up and is not timed."""
    options = LoadOptions(
        ram_bytes=ram,
        vram_bytes=0 if way == "cpu" else vram,
        num_positions=num_positions,
        cache_dir=cache_dir,
        say=lambda line: click.echo(line, err=True),
    )
    opened = open_model(ModelRequest(store), options, needs_tokenizer=False)
    if opened.spread is not None and way in ("layers", "experts"):
        opened = replace(opened, spread=_shared_out(way, opened))
    if opened.device is not None:
        opened.device.replays = way != "eager"
    sequence = opened.load_sequence()
    decoder = sequence.decoder
    vocabulary, seed = decoder.config.vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (tokens + tokens // 4,), generator=seed).tolist()
    _decode(sequence, ids[: tokens // 4])
    meter, program = DecodeMeter(sequence), decoder.program_of(sequence.cache)
    decoder.counters.reset()
    program.reset_ticks()
    hot_before = decoder.hot_neurons(sequence.cache)
    times = _decode(sequence, ids[tokens // 4 :])
    spent, ticks = meter.total(), program.ticks_by_label()
    hot = decoder.hot_neurons(sequence.cache) - hot_before
    cold = spent.tiers.cold_neurons if spent.tiers is not None else decoder.counters.active_neurons
    cpu_bytes, gpu_bytes, roof_s = _bytes_and_roofline(opened, sequence, hot / tokens, tokens, cache_dir)
    own = sum(ticks.get(label, 0) for label in ("launches", "mark", "host")) / 1e3 if decoder.way else 0.0
    return Row(
        way,
        decoder.way,
        1 / statistics.median(times),
        1 / sorted(times)[int(0.9 * len(times))],
        spent.cpu_s / tokens,
        spent.gpu_s / tokens,
        spent.wait_s / tokens,
        hot / max(1, hot + cold),
        own / tokens / decoder.config.num_hidden_layers,
        cpu_bytes,
        gpu_bytes,
        1 / roof_s,
        peak_rss_bytes(),
        opened.device.peak_bytes() if opened.device is not None else 0,
        opened.spread.plan.vram_used_bytes if opened.spread is not None else 0,
    )


def _decode(sequence: TokenSequence, ids: list[int]) -> list[float]:
    """Seconds of each token."""
    times = []
    for token in ids:
        if sequence.is_full:
            sequence.cache.truncate(0)
        started_s = time.perf_counter()
        sequence.step(token)
        times.append(time.perf_counter() - started_s)
    return times


def _bytes_and_roofline(
    opened: OpenModel, sequence: TokenSequence, hot: float, tokens: int, cache_dir: Path
) -> tuple[float, float, float]:
    """Bytes that a token reads on either side, and the seconds that they take at the measured bandwidths."""
    decoder, manifest = sequence.decoder, opened.store.manifest
    row = manifest.quantization.weights.row_bytes(decoder.config.hidden_size)
    parts = 3 if decoder.config.activation.is_gated else 2
    counters = decoder.counters
    cold_bytes = (counters.gate_rows + counters.up_rows + counters.down_rows) * row / tokens
    hot_bytes = hot * parts * row
    dense = {"ram": 0, "gpu": 0}
    if opened.spread is not None:
        parts_there = [(part.kind, part.num_bytes, part.device) for part in opened.spread.plan.parts]
    else:
        parts_of = model_parts(manifest, sequence.cache.num_positions, sequence.cache.dtype, None)
        parts_there = [(part.kind, part.num_bytes, "ram") for part in parts_of]
    for kind, num_bytes, device in parts_there:
        share = sequence.cache.length / sequence.cache.num_positions if kind == "KV cache" else 1.0
        dense[device] += int(num_bytes * share) if kind != "embedding" else 0
    speeds = _speeds(opened, cache_dir)
    gpu_speed = speeds.gpu.memory_bytes_per_s if speeds.gpu is not None else float("inf")
    cpu_speed = speeds.memory_bytes_per_s
    seconds = dense["gpu"] / gpu_speed + dense["ram"] / cpu_speed + max(hot_bytes / gpu_speed, cold_bytes / cpu_speed)
    return dense["ram"] + cold_bytes, dense["gpu"] + hot_bytes, max(seconds, 1e-9)


def _speeds(opened: OpenModel, cache_dir: Path) -> MachineSpeeds:
    weights = opened.store.manifest.quantization.weights
    return machine_speeds(describe_machine(), weights, opened.num_threads, cache_dir, lambda _: None)


def _shared_out(way: Way, opened: OpenModel) -> Spread:
    """The same dense parts on the GPU; neurons by whole layers, or none of them there."""
    spread = opened.spread
    assert spread is not None
    plan, row_format = spread.plan, opened.store.manifest.quantization.weights
    config = opened.store.manifest.config
    bundle = row_format.row_bytes(config.hidden_size) * (3 if config.activation.is_gated else 2)
    left = sum(layer.gpu_bytes for layer in plan.layers) + plan.vram_bytes - plan.vram_used_bytes
    tiers, layers = [], []
    for layer, of_layer in zip(plan.layers, spread.tiers, strict=True):
        size = of_layer.numel() * bundle
        is_there = way == "layers" and size <= left
        left -= size if is_there else 0
        tiers.append(torch.full_like(of_layer, GPU if is_there else RAM))
        layers.append(_whole_layer(layer, size, is_there=is_there, neurons=of_layer.numel()))
    in_ram = sum(layer.ram_bytes for layer in layers)
    spare = plan.ram_bytes - plan.ram_used_bytes + sum(layer.ram_bytes for layer in plan.layers) + plan.cache_bytes
    if in_ram > spare:
        raise SystemExit(f"{way}: needs {format_bytes(in_ram)} of RAM for neurons, and has {format_bytes(spare)}")
    changed: Plan = replace(plan, layers=tuple(layers), disk_used_bytes=0, cache_bytes=0)
    return Spread(changed, tiers)


def _whole_layer(layer: PlanLayer, size: int, *, is_there: bool, neurons: int) -> PlanLayer:
    counts = (neurons, 0) if is_there else (0, neurons)
    sizes = (size, 0) if is_there else (0, size)
    return replace(
        layer,
        merge="gpu" if is_there else "none",
        gpu_neurons=counts[0],
        ram_neurons=counts[1],
        disk_neurons=0,
        gpu_bytes=sizes[0],
        ram_bytes=sizes[1],
        disk_bytes=0,
    )


def line_of(row: Row) -> str:
    """One row of the table."""
    return (
        f"{row.way:8} {row.tokens_per_s:8.2f} tokens/s ({row.slowest_tenth:.2f}), "
        f"{row.tokens_per_s / row.roofline_tokens_per_s:4.0%} of the roofline, {row.hot_share:4.0%} hot, "
        f"CPU {1e3 * row.cpu_s:.2f} ms, waits {1e3 * row.wait_for_gpu_s:.2f} ms for the GPU and "
        f"{1e3 * row.wait_for_disk_s:.2f} ms for the disk, host {row.host_us:.0f} us a layer, "
        f"RAM {row.ram_peak_bytes / GIB:.2f} GiB, VRAM {row.vram_peak_bytes / GIB:.2f} of "
        f"{row.vram_planned_bytes / GIB:.2f} GiB planned  {row.how}"
    )


def llama_bench(program: str, gguf: str, arguments: str, tokens: int) -> dict[str, object]:
    """What llama.cpp says of its own decoding."""
    command = [program, "-m", gguf, "-p", "0", "-n", str(tokens), "-o", "json", *shlex.split(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    answer = json.loads(done.stdout)[-1]
    click.echo(f"llama.cpp {answer['avg_ts']:8.2f} tokens/s  {shlex.join(command[1:])}")
    return {"way": "llama.cpp", "tokens_per_s": answer["avg_ts"], "command": command}


@click.command()
@click.argument("store")
@click.option("--vram", type=Size(), default="8G", show_default=True, help="Of the GPU.")
@click.option("--ram", type=Size(), default=None, help="Of this process. [default: what is free]")
@click.option("--tokens", default=64, show_default=True, help="That are timed.")
@click.option("--ctx", default=4096, show_default=True, help="Context in tokens.")
@click.option("--ways", default=",".join(WAYS), show_default=True, help="Comma-separated.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where speeds are kept.")
@click.option("--llama-bench", "llama", help="llama.cpp's program of that name, built with CUDA.")
@click.option("--gguf", help="The model for it.")
@click.option("--llama-args", default="", help="Its further options.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON with the machine's description.")
@click.option("--alone", is_flag=True, hidden=True)
def main(
    store: str,
    vram: int,
    ram: int | None,
    tokens: int,
    ctx: int,
    ways: str,
    cache_dir: Path | None,
    llama: str | None,
    gguf: str | None,
    llama_args: str,
    output: Path | None,
    *,
    alone: bool,
) -> None:
    """Check, then print a row for each way."""
    cache = cache_dir or default_cache_dir()
    if alone:
        try:
            row = measure(cast("Way", ways), store, vram, ram, tokens, cache, ctx)
        except HybridError as error:
            raise SystemExit(str(error)) from error
        click.echo(json.dumps(asdict(row)))
        return
    if find_device() is None:
        raise SystemExit("no NVIDIA GPU here; docs/gpu.md says what to run where there is one")
    check()
    machine = describe_machine()
    rows: list[dict[str, object]] = []
    for way in ways.split(","):
        budget = machine.vram_bytes if way == "gpu" else vram
        command = [sys.executable, __file__, store, "--alone", "--ways", way, "--vram", str(budget)]
        command += ["--tokens", str(tokens), "--ctx", str(ctx), "--cache-dir", str(cache)]
        command += ["--ram", str(ram)] if ram is not None else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # ourselves
        if done.returncode:
            click.echo(f"{way:8} left out")
            continue
        row = Row(**json.loads(done.stdout.splitlines()[-1]))
        rows.append(asdict(row))
        click.echo(line_of(row))
    if llama is not None and gguf is not None:
        rows.append(llama_bench(llama, gguf, llama_args, tokens))
    found = {"at": datetime.now(UTC).isoformat(), "machine": asdict(machine), "store": store, "rows": rows}
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
