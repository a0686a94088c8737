"""What --verbose says while text is made, and the lines about tiers and memory after it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hybrid_runtime.cli.program import say
from hybrid_runtime.engine import Engine
from hybrid_runtime.generation.meter import DecodeMeter, Spent
from hybrid_runtime.machine import peak_rss_bytes
from hybrid_runtime.sizes import format_bytes

EVERY_S = 1.0


class StatusLine:
    """One line a second. `look` is called after each piece of text."""

    def __init__(self, engine: Engine) -> None:
        self._meter = DecodeMeter(engine.sequence)
        self._next_s = time.perf_counter() + EVERY_S

    def look(self) -> None:
        """Say the line if it is time to."""
        if time.perf_counter() < self._next_s:
            return
        spent = self._meter.lap()
        if spent.tokens:
            say(f"\n[{describe(spent)}]")
        self._next_s = time.perf_counter() + EVERY_S


def describe(spent: Spent) -> str:
    """Tokens a second and, of one token, milliseconds on either side, bytes across, and what the disk did."""
    tokens = max(1, spent.tokens)
    parts = [f"{spent.tokens_per_s:.1f} tokens/s"]
    tiers = spent.tiers
    if tiers is None:
        return f"{parts[0]}, CPU {1e3 * spent.cpu_s / tokens:.1f} ms"
    active = tiers.hot_neurons + tiers.cold_neurons
    has_gpu = tiers.hot_neurons > 0 or spent.crossed_bytes > 0
    parts += [f"{tiers.hot_neurons / max(1, active):.0%} hot"] if has_gpu else []
    sides = {"CPU": spent.cpu_s, **({"GPU": spent.gpu_s} if has_gpu else {}), "wait": spent.wait_s}
    parts += [f"{name} {1e3 * seconds / tokens:.1f} ms" for name, seconds in sides.items()]
    parts += [f"PCIe {format_bytes(spent.crossed_bytes // tokens)}"] if has_gpu else []
    asked = tiers.disk_hits + tiers.disk_misses
    if asked:
        read = format_bytes(tiers.disk_bytes // tokens)
        parts.append(f"disk {asked // tokens} asked, {tiers.disk_hits / asked:.0%} in the cache, {read} read")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class TiersUsed:
    """Of a model that is spread over tiers: what was promised and used, and a token's work, for `--json`. Times are
    seconds of one token; vram_peak_bytes: of a simulated GPU what is in use.
    """

    ram_promised_bytes: int
    ram_peak_bytes: int
    vram_promised_bytes: int
    vram_peak_bytes: int
    is_simulated: bool
    cpu_s: float
    gpu_s: float
    wait_s: float
    crossed_bytes: int
    hot_neurons: int
    cold_neurons: int
    disk_asked: int
    disk_hits: int
    disk_bytes: int


def tiers_used(engine: Engine, spent: Spent) -> TiersUsed | None:
    """None where all of the model is in one memory."""
    spread, tiers, decoder = engine.spread, spent.tiers, engine.sequence.decoder
    if spread is None or tiers is None:
        return None
    tokens, simulated = max(1, spent.tokens), engine.simulated_bytes
    return TiersUsed(
        ram_promised_bytes=spread.plan.ram_bytes,
        ram_peak_bytes=peak_rss_bytes() - simulated,
        vram_promised_bytes=spread.plan.vram_bytes,
        vram_peak_bytes=decoder.vram_peak_bytes if decoder.is_on_cuda else simulated,
        is_simulated=spread.plan.vram_bytes > 0 and not decoder.is_on_cuda,
        cpu_s=spent.cpu_s / tokens,
        gpu_s=spent.gpu_s / tokens,
        wait_s=spent.wait_s / tokens,
        crossed_bytes=spent.crossed_bytes // tokens,
        hot_neurons=tiers.hot_neurons // tokens,
        cold_neurons=tiers.cold_neurons // tokens,
        disk_asked=(tiers.disk_hits + tiers.disk_misses) // tokens,
        disk_hits=tiers.disk_hits // tokens,
        disk_bytes=tiers.disk_bytes // tokens,
    )


def closing_lines(engine: Engine, spent: Spent) -> list[str]:
    """After an answer: how memory was used, against what was promised and planned; what the tiers did."""
    planned = format_bytes(engine.memory_plan.total)
    spread = engine.spread
    if spread is None:
        return [f"memory   peak {format_bytes(peak_rss_bytes())}, planned {planned}"]
    simulated = engine.simulated_bytes
    promised, peak = format_bytes(spread.plan.ram_bytes), format_bytes(peak_rss_bytes() - simulated)
    lines = [f"memory   RAM  peak {peak} of {promised}, planned {planned}"]
    if spread.plan.vram_bytes:
        decoder = engine.sequence.decoder
        in_use = f"{format_bytes(simulated)} in use, simulated in RAM"
        if decoder.is_on_cuda:
            in_use = f"peak {format_bytes(decoder.vram_peak_bytes)} ({decoder.way})"
        lines.append(
            f"         VRAM {in_use}, of {format_bytes(spread.plan.vram_bytes)}, "
            f"planned {format_bytes(spread.simulated_bytes)} and CUDA's own"
        )
    lines.append(f"tiers    a token: {describe(spent)}")
    return lines
