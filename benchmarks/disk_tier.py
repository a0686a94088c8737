"""Decoding a model that RAM does not hold: tokens a second by --ram, against what the disk allows for the bytes read.

    python benchmarks/disk_tier.py STORE --vram 8G --ram 6G,8G,10G,12G --text FILE [-o results.json]

One process for each --ram; the GPU is simulated (its memory is this process's, beside --ram). What the disk allows are
the run's own counts of reads and bytes at the speeds that hybrid-doctor measured: reads of 4 KiB a second, and bytes a
second in reads of 64 KiB, both random, past the page cache, eight at a time. A token cannot be quicker than the slower.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import click
import torch

from hybrid_runtime.cli.options import Size
from hybrid_runtime.engine import default_cache_dir, open_model
from hybrid_runtime.generation.meter import DecodeMeter
from hybrid_runtime.generation.sequence import TokenSequence
from hybrid_runtime.load_options import LoadOptions
from hybrid_runtime.machine import describe_machine, peak_rss_bytes
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.speeds.disk import DiskSpeeds
from hybrid_runtime.speeds.machine_speeds import machine_speeds, with_disk_of
from hybrid_runtime.stores import ModelRequest, load_store_tokenizer

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Row:
    """Of one --ram; everything from tokens_per_s to waited_s is per token or a rate."""

    vram_bytes: int
    ram_bytes: int
    ram_peak_bytes: int
    vram_used_bytes: int
    disk_bytes: int
    tokens_per_s: float
    hot_share: float
    asked: float
    hit_share: float
    reads: float
    read_bytes: float
    waited_s: float
    allowed_s: float
    allowed_by_bytes_s: float

    @property
    def share(self) -> float:
        """Of the speed that the disk allows."""
        return self.allowed_s * self.tokens_per_s


def measure(
    store: str, vram: int, ram: int, tokens: int, warm: int, cache_dir: Path, num_positions: int, text: Path | None
) -> Row:
    """Decode the end of a text, or random tokens; the first `warm` of them fill the cache and are not timed."""
    options = LoadOptions(
        ram_bytes=ram,
        vram_bytes=vram,
        simulates_gpu=vram > 0,
        num_positions=num_positions,
        cache_dir=cache_dir,
        say=lambda line: click.echo(line, err=True),
    )
    opened = open_model(ModelRequest(store), options, needs_tokenizer=False)
    assert opened.spread is not None, "the model fits --ram: nothing is on disk"
    sequence = opened.load_sequence()
    decoder = sequence.decoder
    tiering = decoder.weights.tiering
    assert tiering is not None
    count = warm + tokens
    if text is None:
        ids = torch.randint(0, decoder.config.vocab_size, (count,), generator=torch.Generator().manual_seed(0))
    else:
        tokenizer, _ = load_store_tokenizer(opened.store)
        ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")[-16 * count :])[-count:])
    _decode(sequence, ids[:warm])
    meter = DecodeMeter(sequence)
    started_s = time.perf_counter()
    _decode(sequence, ids[warm:])
    seconds = time.perf_counter() - started_s
    spent = meter.total()
    counts = spent.tiers
    assert counts is not None
    speeds = with_disk_of(
        machine_speeds(
            describe_machine(), opened.store.manifest.quantization.weights, decoder.team.num_threads, cache_dir, _quiet
        ),
        opened.store.folder,
        cache_dir,
        _quiet,
    )
    allowed_s = _allowed_s(speeds.disk, counts.disk_reads / tokens, counts.disk_bytes / tokens)
    active = counts.hot_neurons + counts.cold_neurons
    asked = counts.disk_hits + counts.disk_misses
    return Row(
        vram,
        ram,
        peak_rss_bytes() - tiering.gpu_bytes,
        tiering.gpu_bytes,
        opened.spread.plan.disk_used_bytes,
        tokens / seconds,
        counts.hot_neurons / max(1, active),
        asked / tokens,
        counts.disk_hits / max(1, asked),
        counts.disk_reads / tokens,
        counts.disk_bytes / tokens,
        spent.wait_s / tokens,
        allowed_s,
        counts.disk_bytes / tokens / speeds.disk.bytes_per_s,
    )


def _allowed_s(disk: DiskSpeeds, reads: float, num_bytes: float) -> float:
    return max(reads / disk.small_reads_per_s, num_bytes / disk.bytes_per_s)


def _decode(sequence: TokenSequence, ids: torch.Tensor) -> None:
    for token in ids.tolist():
        if sequence.is_full:
            sequence.cache.truncate(0)
        sequence.step(token)


def _quiet(message: str) -> None:
    del message


def line_of(row: Row) -> str:
    """One row of the table."""
    return (
        f"vram {row.vram_bytes / GIB:4.1f} ram {row.ram_bytes / GIB:4.1f} GiB: peak {row.ram_peak_bytes / GIB:5.2f}, "
        f"{row.disk_bytes / GIB:5.2f} GiB on disk, {row.tokens_per_s:6.2f} tokens/s, {row.hot_share:4.0%} hot, "
        f"{row.asked:6.0f} asked of the disk's ({row.hit_share:4.0%} in the cache), {row.reads:6.0f} reads, "
        f"{format_bytes(int(row.read_bytes)):>10}, waited {1e3 * row.waited_s:5.0f} ms, "
        f"{row.share:4.0%} of what the disk allows "
        f"({row.allowed_by_bytes_s * row.tokens_per_s:4.0%} of its bytes a second)"
    )


@click.command()
@click.argument("store")
@click.option("--vram", type=Size(), default="8G", help="Of the simulated GPU.")
@click.option("--ram", default="6G,8G,10G,12G", help="Budgets, comma-separated.")
@click.option("--tokens", default=40, help="That are timed.")
@click.option("--warm", default=40, help="That fill the cache before.")
@click.option("--ctx", default=4096, help="Context in tokens.")
@click.option("--text", type=click.Path(path_type=Path), help="Whose end is decoded. [default: random tokens]")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where speeds are kept.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON with the machine's description.")
@click.option("--alone", is_flag=True, hidden=True)
def main(
    store: str,
    vram: int,
    ram: str,
    tokens: int,
    warm: int,
    ctx: int,
    text: Path | None,
    cache_dir: Path | None,
    output: Path | None,
    *,
    alone: bool,
) -> None:
    """Print a row for each --ram."""
    cache = cache_dir or default_cache_dir()
    if alone:
        row = measure(store, vram, Size().convert(ram, None, None), tokens, warm, cache, ctx, text)
        click.echo(json.dumps(asdict(row)))
        return
    rows = []
    for size in ram.split(","):
        command = [
            sys.executable,
            __file__,
            store,
            "--vram",
            str(vram),
            "--ram",
            size,
            "--tokens",
            str(tokens),
            "--alone",
        ]
        command += ["--warm", str(warm), "--ctx", str(ctx), "--cache-dir", str(cache)]
        command += ["--text", str(text)] if text is not None else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # ourselves
        if done.returncode:
            click.echo(f"--ram {size}: refused")
            continue
        rows.append(Row(**json.loads(done.stdout.splitlines()[-1])))
        click.echo(line_of(rows[-1]))
    if output is not None:
        machine = asdict(describe_machine())
        output.write_text(
            json.dumps({"machine": machine, "store": store, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
