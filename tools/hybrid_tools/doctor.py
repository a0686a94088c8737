"""hybrid-doctor: what this machine has, and how fast it is.

    hybrid-doctor                 the machine, and what was measured of it (measured now, where nothing was)
    hybrid-doctor --measure       measure again

hybrid-place plans with these figures. They are kept in the user's cache and belong to this hardware.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hybrid_runtime import __version__
from hybrid_runtime.cli.options import cache_dir_option, threads_option
from hybrid_runtime.cli.program import run_program, say

if TYPE_CHECKING:  # heavy, and --help should not wait
    from hybrid_runtime.machine import Machine
    from hybrid_runtime.speeds.machine_speeds import MachineSpeeds


@click.command(
    name="hybrid-doctor",
    help="Show this machine: processor, memory, GPU, and the speeds that placement plans with.",
    context_settings={"max_content_width": 110},
)
@click.option("--measure", is_flag=True, help="Measure again, which takes some ten seconds and 1.5 GiB of memory.")
@click.option(
    "--quant", type=click.Choice(["f32", "bf16", "q8", "q4"]), default="q4", show_default=True,
    help="Weights whose kernels are measured.",
)  # fmt: skip
@threads_option
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.version_option(__version__, prog_name="hybrid-doctor")
def command(*, measure: bool, quant: str, threads: int | None, cache_dir: Path | None, as_json: bool) -> int:
    """Look, measure, print."""
    from hybrid_runtime.cli.loading import use_threads  # noqa: PLC0415  # imports torch
    from hybrid_runtime.engine import default_cache_dir  # noqa: PLC0415
    from hybrid_runtime.machine import describe_machine  # noqa: PLC0415
    from hybrid_runtime.speeds.machine_speeds import machine_speeds  # noqa: PLC0415
    from hybrid_runtime.stores import asked_quantization  # noqa: PLC0415

    machine = describe_machine()
    num_threads = threads or min(machine.physical_cores, machine.usable_cores)
    use_threads(num_threads)
    row_format = asked_quantization(quant, None).weights
    folder = cache_dir or default_cache_dir()
    speeds = machine_speeds(machine, row_format, num_threads, folder, say, measures_again=measure)
    if as_json:
        click.echo(json.dumps({"machine": asdict(machine), "speeds": asdict(speeds)}))
        return 0
    for line in _lines(machine, speeds):
        click.echo(line)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; argv without the program's name."""
    return run_program(command, argv)


def _lines(machine: Machine, speeds: MachineSpeeds) -> Iterator[str]:
    from hybrid_runtime.sizes import format_bytes  # noqa: PLC0415

    yield f"processor   {machine.cpu_name}, {machine.physical_cores} cores, {machine.usable_cores} usable threads"
    yield f"            {', '.join(machine.instruction_sets) or 'no vector instructions known'}"
    yield f"caches      {format_bytes(speeds.cache_bytes)} in the last level"
    yield f"memory      {format_bytes(machine.total_ram_bytes)}, {format_bytes(machine.available_ram_bytes)} free now"
    yield f"GPU         {machine.gpu_name or f'none: {machine.no_gpu_reason}'}"
    yield f"software    Python {machine.python_version}, torch {machine.torch_version}, Numba {machine.numba_version}"
    yield f"measured    {speeds.measured_at}, with {speeds.num_threads} threads:"
    yield f"  memory read                      {speeds.memory_bytes_per_s / 1e9:8.1f} GB/s"
    for kernel in speeds.kernels:
        name = str(kernel.row_format)
        yield f"  {name + ', rows in order':32} {kernel.dense_bytes_per_s / 1e9:8.1f} GB/s"
        yield f"  {name + ', all gates':32} {kernel.gates_bytes_per_s / 1e9:8.1f} GB/s"
        yield f"  {name + ', single rows':32} {kernel.sparse_bytes_per_s / 1e9:8.1f} GB/s"
        yield f"  {name + ', in caches':32} {kernel.cached_bytes_per_s / 1e9:8.1f} GB/s"
        per_row = f"a row {kernel.row_s * 1e9:.0f} ns"
        yield f"  {name + ', an operation':32} {kernel.operation_s * 1e6:8.1f} us, {per_row}"
        yield f"  {name + ', a token besides':32} {kernel.token_s * 1e6:8.1f} us"
    disk = speeds.disk
    cached = "" if disk.past_cache else " (through the page cache: this file system has no direct reads)"
    yield f"  disk, reads of 4 KiB             {disk.small_reads_per_s:8.0f} a second{cached}"
    yield f"  disk, reads of 64 KiB            {disk.bytes_per_s / 1e9:8.2f} GB/s"
    if speeds.gpu is not None:
        gpu = speeds.gpu
        yield f"  GPU memory                       {gpu.memory_bytes_per_s / 1e9:8.1f} GB/s"
        back, launch = f"{gpu.from_gpu_bytes_per_s / 1e9:.1f} GB/s", f"a launch {gpu.launch_s * 1e6:.1f} us"
        yield f"  to the GPU, from it              {gpu.to_gpu_bytes_per_s / 1e9:8.1f}, {back}"
        yield f"  there and back                   {gpu.round_trip_s * 1e6:8.1f} us, {launch}"


if __name__ == "__main__":
    sys.exit(main())
