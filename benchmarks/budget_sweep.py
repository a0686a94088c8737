"""Runs under many budgets, each in a process of its own: what was promised and measured, or why it was refused.

    python benchmarks/budget_sweep.py STORE [--vram 0,1G,2G] [--ram 0.25,0.5,1]    shares are of the store's bytes
    python benchmarks/budget_sweep.py tinystories-moe --cgroup

The GPU is simulated. With --cgroup (root, cgroup v1 or v2) each run is also held to its budgets by the system: RAM and
the simulated VRAM together are all that its memory group may have.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from hybrid_runtime.cli.options import Size
from hybrid_runtime.machine import describe_machine
from hybrid_runtime.sizes import format_bytes, parse_bytes

GROUP_V1, GROUP_V2 = Path("/sys/fs/cgroup/memory/hybrid-sweep"), Path("/sys/fs/cgroup/hybrid-sweep")
SPARE_BYTES = 64 << 20  # of the group: the page tables and the interpreter's start
MEMORY = re.compile(r"RAM  peak ([\d.]+ \w+) of")
VRAM = re.compile(r"VRAM ([\d.]+ \w+) in use")
SPEED = re.compile(r"decode .* ([\d.]+) tokens/s")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. peaks are None where it was refused, as message says."""

    vram_bytes: int
    ram_bytes: int
    code: int
    ram_peak_bytes: int | None
    vram_peak_bytes: int | None
    tokens_per_s: float | None
    message: str

    @property
    def is_fine(self) -> bool:
        """Within both budgets, or refused with a number."""
        if self.code == 0:
            peak, vram = self.ram_peak_bytes or 0, self.vram_peak_bytes or 0
            return peak <= 1.05 * self.ram_bytes and vram <= self.vram_bytes
        return self.code == 2 and bool(re.search(r"\d", self.message))


def run(model: str, vram: int, ram: int, tokens: int, cache_dir: Path, group: Path | None) -> Outcome:
    """In a process of its own."""
    budgets = ["--ram", str(ram), *(["--vram", str(vram), "--simulate-gpu"] if vram else [])]
    command = [sys.executable, "-m", "hybrid_runtime.cli.run", "--model", model, "--prompt", "Once upon a time"]
    command += [*budgets, "--max-tokens", str(tokens), "--seed", "1", "--temperature", "0", "--ctx", "256"]
    command += ["--cache-dir", str(cache_dir)]
    if group is not None:
        _limit(group, ram + vram + SPARE_BYTES)
    if group is not None:  # a shell joins the group and becomes the program
        command = ["sh", "-c", f'echo $$ > {group / "cgroup.procs"} && exec "$@"', "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # our own program
    errors = done.stderr
    peak, used, speed = MEMORY.search(errors), VRAM.search(errors), SPEED.search(errors)
    return Outcome(
        vram,
        ram,
        done.returncode,
        parse_bytes(peak[1].replace(" ", "")) if peak else _plain_peak(errors),
        parse_bytes(used[1].replace(" ", "")) if used else None,
        float(speed[1]) if speed else None,
        errors.strip().splitlines()[-1] if errors.strip() else "",
    )


def _plain_peak(errors: str) -> int | None:
    found = re.search(r"memory   peak ([\d.]+ \w+)", errors)
    return parse_bytes(found[1].replace(" ", "")) if found else None


def _limit(group: Path, num_bytes: int) -> None:
    group.mkdir(exist_ok=True)
    name = "memory.limit_in_bytes" if group == GROUP_V1 else "memory.max"
    (group / name).write_text(str(num_bytes))


def line_of(outcome: Outcome) -> str:
    """One row of the table."""
    sizes = (outcome.vram_bytes, outcome.ram_bytes, outcome.vram_peak_bytes, outcome.ram_peak_bytes)
    vram, ram, vram_peak, ram_peak = ("-" if size is None else format_bytes(size) for size in sizes)
    row = f"{'ok' if outcome.is_fine else 'BAD':3} vram {vram:>11} ram {ram:>11}  "
    if outcome.code:
        return f"{row}exit {outcome.code}: {outcome.message}"
    return f"{row}peaks {vram_peak:>11} {ram_peak:>11}  {outcome.tokens_per_s or 0:8.1f} tokens/s"


@click.command()
@click.argument("model")
@click.option("--vram", default="0,700M", help="Sizes, comma-separated.")
@click.option("--ram", default="0.25,0.4,0.6,0.8,1,1.3", help="Sizes, or shares of the store's bytes.")
@click.option("--tokens", default=16, help="Generated in each run.")
@click.option("--cgroup", is_flag=True, help="Have the system enforce the budgets too.")
@click.option("--cache-dir", type=click.Path(path_type=Path), default=Path("/tmp/hybrid-sweep"))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON of the table.")
def main(model: str, vram: str, ram: str, tokens: int, *, cgroup: bool, cache_dir: Path, output: Path | None) -> None:
    """Print a line a run; exit 1 where one was not fine."""
    size = sum(path.stat().st_size for path in Path(model).rglob("*.bin")) if Path(model).is_dir() else 0
    group = (GROUP_V1 if GROUP_V1.parent.is_dir() else GROUP_V2) if cgroup else None
    outcomes = []
    for vram_text in vram.split(","):
        for ram_text in ram.split(","):
            is_share = size and re.fullmatch(r"[\d.]+", ram_text) and float(ram_text) <= 16
            ram_bytes = int(float(ram_text) * size) if is_share else Size().convert(ram_text, None, None)
            each = run(model, Size().convert(vram_text, None, None), ram_bytes, tokens, cache_dir, group)
            outcomes.append(each)
            click.echo(line_of(each))
    with suppress(OSError):
        if group is not None:
            group.rmdir()
    if output is not None:
        values = [asdict(each) for each in outcomes]
        machine = asdict(describe_machine())
        output.write_text(
            json.dumps({"machine": machine, "model": model, "cgroup": cgroup, "runs": values}, indent=1) + "\n"
        )
    sys.exit(0 if all(each.is_fine for each in outcomes) else 1)


if __name__ == "__main__":
    main()
