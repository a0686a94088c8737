"""Pictures of runs and of sparsity, as PNG or SVG by the file's name. Matplotlib is the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_runtime.errors import UsageError
from hybrid_tools.training.run_log import read_log
from hybrid_tools.training.sparsity import Firing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED_STEPS = 100  # points that a curve keeps; single steps hide it in noise


def draw_run(log: Path, picture: Path) -> None:
    """Loss, held-out loss and share of zeros over one run's steps."""
    figure, (above, below) = _figure(2)
    _draw_losses(above, {"": log})
    steps = [line for line in read_log(log) if "zeros" in line]
    below.plot(*_smoothed([line["step"] for line in steps], [100 * line["zeros"] for line in steps]), color="tab:green")
    below.set(xlabel="step", ylabel="exact zeros, %", ylim=(0, 100))
    _save(figure, picture)


def draw_losses(logs: Mapping[str, Path], picture: Path) -> None:
    """Loss over steps of several runs."""
    figure, (axes,) = _figure(1)
    _draw_losses(axes, logs)
    _save(figure, picture)


def draw_sparsity(firings: Mapping[str, Firing], picture: Path) -> None:
    """Share of exact zeros by layer, one line a model, one small dot an expert."""
    figure, (axes,) = _figure(1)
    for label, firing in firings.items():
        layers = range(len(firing.counts))
        (line,) = axes.plot(layers, [100 * firing.zero_share(idx) for idx in layers], marker="o", label=label)
        for idx in layers:
            shares = [100 * share for share in firing.expert_zero_shares(idx)]
            axes.plot([idx] * len(shares), shares, ".", color=line.get_color(), alpha=0.4)
    axes.set(
        xlabel="layer", ylabel="exact zeros, %", xticks=list(range(max(len(each.counts) for each in firings.values())))
    )
    axes.legend()
    _save(figure, picture)


def draw_frequencies(firings: Mapping[str, Firing], picture: Path) -> None:
    """By layer: the share of all firings that the most frequent neurons make."""
    figure, panels = _figure(len(firings))
    for axes, (label, firing) in zip(panels, firings.items(), strict=True):
        for layer_idx in range(len(firing.counts)):
            shares = 100 * firing.cumulative(layer_idx)
            neurons = [100 * (idx + 1) / len(shares) for idx in range(len(shares))]
            axes.plot(neurons, shares.tolist(), label=f"layer {layer_idx}")
        axes.axhline(80, color="grey", linewidth=0.5)
        axes.set(title=label, xlabel="most frequent neurons, %", ylabel="their share of all firings, %")
        axes.legend()
    _save(figure, picture)


def _draw_losses(axes: Axes, logs: Mapping[str, Path]) -> None:
    for label, path in logs.items():
        lines = list(read_log(path))
        steps = [line for line in lines if "loss" in line]
        tests = [line for line in lines if "held_out" in line]
        (curve,) = axes.plot(
            *_smoothed([line["step"] for line in steps], [line["loss"] for line in steps]),
            label=f"{label} training".strip(),
        )
        if tests:
            losses = [_all_losses(line["held_out"]) for line in tests]
            axes.plot(
                [line["step"] for line in tests],
                losses,
                color=curve.get_color(),
                linestyle="none",
                marker="x",
                label=f"{label} held out".strip(),
            )
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.legend()


def _all_losses(losses: object) -> float:
    assert isinstance(losses, dict)
    return float(losses["all"])


def _smoothed(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over stretches of equal length."""
    size = max(1, len(values) // SMOOTHED_STEPS)
    starts = range(0, len(values), size)
    return (
        [sum(steps[start : start + size]) / len(steps[start : start + size]) for start in starts],
        [sum(values[start : start + size]) / len(values[start : start + size]) for start in starts],
    )


def _figure(num_panels: int) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  # not pyplot, which has a global state and a window
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'hybrid-runtime[train]'") from error
    figure = Figure(figsize=(7, 4 * num_panels), layout="constrained")
    return figure, list(figure.subplots(num_panels, squeeze=False)[:, 0])


def _save(figure: Figure, picture: Path) -> None:
    figure.savefig(picture, dpi=110)
