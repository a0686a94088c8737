"""How every picture of the report looks: one style, scales for layers, maps of cells; as PNG, or as SVG for a page.

Matplotlib (the extra `plots`) is used without pyplot, so without a window or global state. Text and lines are drawn in
INK, which an SVG turns into the page's own colour. Colours are safe for the colour-blind: viridis without its ends for
layers, Okabe and Ito's for kinds.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_runtime.whole_files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

INK = "#16181d"
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a8f98"
WIDTH, PANEL_HEIGHT = 9.0, 3.8  # inches
PNG_DPI = 110
MOST_NAME_CHARS = 48
MOST_NUMBERED_CELLS = 512
REMEDY = "pip install 'hybrid-runtime[plots]'"
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 9.5,
    "legend.frameon": False,
    "axes.grid": False,
    "svg.fonttype": "path",  # the same letters everywhere
    "svg.hashsalt": "hybrid-inspect",  # the same file for the same facts
}


def has_matplotlib() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def our_style() -> AbstractContextManager[None]:
    """While it is entered, what is drawn looks like ours."""
    from matplotlib import rc_context  # noqa: PLC0415

    return rc_context(STYLE)  # type: ignore[arg-type]  # the stubs spell every key out


def save_png(figure: Figure, path: Path) -> None:
    """On white, whole or not at all."""
    data = io.BytesIO()
    with our_style():
        figure.savefig(data, format="png", dpi=PNG_DPI, facecolor="white")
    write_whole(path, data.getvalue())


def to_svg(figure: Figure, name: str) -> str:
    """An <svg> element for a page: transparent, in the page's colour, with ids that begin with name."""
    data = io.StringIO()
    with our_style():
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = data.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page sizes it, by its viewBox
    return svg.replace(INK, "currentColor")


def new_figure(
    num_rows: int, num_columns: int, height: float | None = None, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[list[Axes]]]:
    """Panels in rows and columns; sizes are in inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(WIDTH, height or PANEL_HEIGHT * num_rows), layout="constrained")
    return figure, figure.subplots(num_rows, num_columns, squeeze=False, height_ratios=ratios).tolist()


def heat_map(
    cells: Sequence[Sequence[float]],
    title: str,
    colours: str,
    label: str,
    number: str,
) -> Figure:
    """Experts across, layers down, with the numbers in the cells where there is room."""
    num_layers, num_experts = len(cells), len(cells[0])
    figure, ((axes,),) = new_figure(1, 1, height=min(12.0, 1.3 + max(1.6, 0.24 * num_layers)))
    image = axes.imshow(cells, cmap=colours, interpolation="none", aspect="auto")
    colour_of: Any = image.to_rgba  # the stubs know arrays only
    axes.spines[:].set_visible(False)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    integer_ticks(axes.xaxis)
    integer_ticks(axes.yaxis)
    axes.tick_params(length=0)
    if num_layers * num_experts <= MOST_NUMBERED_CELLS and num_experts <= 32:
        for layer_idx, row in enumerate(cells):
            for expert_idx, value in enumerate(row):
                red, green, blue, _ = colour_of(value)
                is_light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
                axes.text(
                    expert_idx, layer_idx, number.format(value), ha="center", va="center", fontsize=8,
                    color="black" if is_light else "white",
                )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02)
    if colours.endswith("_r"):
        bar.ax.invert_yaxis()  # the bright end is up
    return figure


def by_layer(axes: Axes, num_layers: int) -> None:
    """Layers go to the right; a faint line at each step up."""
    axes.set(xlabel="layer", xlim=(-0.6, num_layers - 0.4))
    integer_ticks(axes.xaxis)
    axes.grid(visible=True, axis="y", color=GREY, alpha=0.25, linewidth=0.7)
    axes.set_axisbelow(True)


def plain_log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    if min(values) <= 0:
        return
    axes.set_yscale("log")
    axes.set_ylim(min([1.0, *values]) / 1.3, max([1.0, *values]) * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def integer_ticks(axis: Axis) -> None:
    """Layers and experts have whole numbers."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    axis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))


def legend_below(axes: Axes) -> None:
    """Out of the way of what is drawn."""
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4, borderaxespad=0.2)


def layer_colours(num_layers: int) -> list[tuple[float, float, float, float]]:
    """One a layer, from the first to the last."""
    return [_layer_map()(idx / max(1, num_layers - 1)) for idx in range(num_layers)]


def layer_bar(figure: Figure, axes: Axes | list[Axes], num_layers: int) -> None:
    """Which colour is which layer."""
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import Normalize  # noqa: PLC0415

    bar = figure.colorbar(ScalarMappable(Normalize(0, max(1, num_layers - 1)), _layer_map()), ax=axes, label="layer")
    integer_ticks(bar.ax.yaxis)


def clean(text: str) -> str:
    """A name from a file as a title: short, printable, and no formula."""
    shown = "".join(each if each.isprintable() else "?" for each in text)
    shown = shown if len(shown) <= MOST_NAME_CHARS else f"{shown[: MOST_NAME_CHARS - 1]}…"
    return shown.replace("$", "\\$")


def _layer_map() -> LinearSegmentedColormap:
    """Viridis without its ends, which a dark or a white page would swallow."""
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415

    steps = 64
    colours = colormaps["viridis"]([0.2 + 0.65 * idx / (steps - 1) for idx in range(steps)])
    return LinearSegmentedColormap.from_list("layers", colours)
