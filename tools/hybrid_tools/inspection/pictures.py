"""The report's pictures: what each of them draws from the facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybrid_tools.inspection.facts import (
    CURVE,
    FIRING_SHARES,
    HISTOGRAM_SHARES,
    PAPER_SHARE,
    Correlation,
    Curve,
    PlacementLayer,
    PopularityFacts,
    PredictorLayer,
    ProfileFacts,
    Report,
    TensorFacts,
)
from hybrid_tools.inspection.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    WIDTH,
    by_layer,
    clean,
    heat_map,
    layer_bar,
    layer_colours,
    legend_below,
    new_figure,
    our_style,
    plain_log_scale,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LEGEND_LAYERS = 10  # more get a colour bar
MOST_TRANSITIONS = 64  # small maps in one picture
MOST_TRANSITION_EXPERTS = 64


@dataclass(frozen=True, slots=True)
class Picture:
    """name: of its file; title: what it shows, in words; make: draws it, in whatever style is set."""

    name: str
    title: str
    make: Callable[[], Figure]

    def draw(self) -> Figure:
        """In our style."""
        with our_style():
            return self.make()


def pictures_of(report: Report) -> list[Picture]:
    """What there is to draw, in the page's order; nothing is drawn yet."""
    return list(_pictures(report))


def _pictures(report: Report) -> Iterator[Picture]:
    if (profile := report.profile) is not None:
        yield from _profile_pictures(profile)
    if predictors := report.predictors:
        yield Picture("predictors", "Predictors by layer", lambda: draw_predictors(predictors))
    if placement := report.placement:
        yield Picture("placement", "What lies where, by layer", lambda: draw_placement(placement))
    if (popularity := report.popularity) is not None:
        yield Picture("popularity", "Published popularity of experts", lambda: draw_popularity(popularity))
    if histograms := report.histograms:
        yield Picture("histograms", "Published magnitudes of activations", lambda: draw_histograms(histograms))


def _profile_pictures(profile: ProfileFacts) -> Iterator[Picture]:
    yield Picture("zeros", "Share of exact zeros by layer", lambda: draw_zeros(profile))
    if (firing := profile.firing) is not None:
        yield Picture("shares", "Share of firings by share of neurons", lambda: draw_firing(profile, firing))
        yield Picture("dead", "Neurons that never fired, by layer", lambda: draw_dead(profile))
    if profile.is_mixture:
        yield Picture("experts", "How often each expert is chosen", lambda: draw_experts(profile))
    if 0 < len(profile.transitions) <= MOST_TRANSITIONS and profile.num_experts <= MOST_TRANSITION_EXPERTS:
        yield Picture("transitions", "Which expert follows which", lambda: draw_transitions(profile))
    if any(layer.spread is not None for layer in profile.layers):
        yield Picture("spread", "How much neurons fire together, by layer", lambda: draw_spread(profile))
    if (correlation := profile.correlation) is not None:
        yield Picture("correlation", "Which neurons fire together", lambda: draw_correlation(correlation))


def draw_zeros(profile: ProfileFacts) -> Figure:
    """A line for the layers, a dot for each of their experts."""
    figure, ((axes,),) = new_figure(1, 1)
    axes.axhline(100 * profile.zero_share, color=GREY, linewidth=0.9, linestyle="--", label="mean over layers")
    if profile.is_mixture:
        dots = [
            (layer.layer_idx, 100 * share)
            for layer in profile.layers
            for share in layer.expert_zero_shares
            if share is not None
        ]
        x, y = zip(*dots, strict=True) if dots else ((), ())
        axes.plot(x, y, "o", color=ORANGE, markersize=4, alpha=0.65, markeredgewidth=0, label="one expert")
    layers = [layer.layer_idx for layer in profile.layers]
    axes.plot(layers, [100 * layer.zero_share for layer in profile.layers], "o-", color=BLUE, label="layer")
    by_layer(axes, len(layers))
    axes.set(ylabel="exact zeros, % of values", title=f"{clean(profile.model)}: how much of each layer is zero")
    axes.margins(y=0.12)
    axes.set_ylim(top=min(100.5, axes.get_ylim()[1]))
    legend_below(axes)
    return figure


def draw_firing(profile: ProfileFacts, firing: Curve) -> Figure:
    """The power law: a curve for each layer, a thick one for the whole model."""
    figure, ((axes,),) = new_figure(1, 1, height=4.6)
    percent = [100 * share for share in CURVE]
    many = len(profile.layers) > MOST_LEGEND_LAYERS
    for layer, colour in zip(profile.layers, layer_colours(len(profile.layers)), strict=True):
        if layer.firing is not None:
            curve = [100 * share for share in layer.firing.cumulative]
            label = None if many else f"layer {layer.layer_idx}"
            axes.plot(percent, curve, color=colour, linewidth=1.0 if many else 1.5, label=label)
    axes.plot(percent, [100 * share for share in firing.cumulative], color=INK, linewidth=2.6, label="whole model")
    axes.axhline(100 * PAPER_SHARE, color=GREY, linewidth=0.8, linestyle="--")
    needed = 100 * firing.needed[FIRING_SHARES.index(PAPER_SHARE)]
    axes.plot([needed], [100 * PAPER_SHARE], "o", color=INK, markersize=7)
    axes.annotate(
        f"{needed:.1f} % of all neurons make {100 * PAPER_SHARE:.0f} %",
        (needed, 100 * PAPER_SHARE),
        (min(max(needed + 25, 50), 62), 45),
        arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.8},
    )
    axes.set(xlim=(0, 100), ylim=(0, 101), title=f"{clean(profile.model)}: how few neurons do most of the firing")
    axes.set(xlabel="most frequent neurons, % of the layer's (thick: the model's)", ylabel="share of all firings, %")
    axes.legend(loc="lower right", ncols=1 if len(profile.layers) < 6 else 2)
    if many:
        layer_bar(figure, axes, len(profile.layers))
    return figure


def draw_dead(profile: ProfileFacts) -> Figure:
    """A bar for each layer."""
    figure, ((axes,),) = new_figure(1, 1, height=3.0)
    shares = [100 * layer.firing.dead if layer.firing else 100.0 for layer in profile.layers]
    top = 1.1 * max([1.0, *shares])
    axes.bar(range(len(shares)), shares, color=BLUE, width=0.7)
    by_layer(axes, len(shares))
    axes.set(
        ylabel="% of the layer's neurons", ylim=(0, top),
        title=f"{clean(profile.model)}: neurons that never fired in {profile.num_tokens:,} tokens",
    )  # fmt: skip
    return figure


def draw_experts(profile: ProfileFacts) -> Figure:
    """A cell for each expert: its share of its layer's tokens."""
    per_token = profile.num_experts_per_tok
    cells = [[100 * share * per_token for share in layer.expert_shares] for layer in profile.layers]
    even = 100 * per_token / profile.num_experts
    title = f"{clean(profile.model)}: tokens that go to each expert, % (all alike: {even:.3g} %)"
    return heat_map(cells, title, "viridis", "% of tokens", "{:.0f}")


def draw_popularity(popularity: PopularityFacts) -> Figure:
    """A cell for each expert: its place among all."""
    count = sum(map(len, popularity.places))
    title = f"published place of each expert among all {count}, 1 the most popular"
    cells = [[place + 1.0 for place in places] for places in popularity.places]
    return heat_map(cells, title, "viridis_r", "place", "{:.0f}")


def draw_transitions(profile: ProfileFacts) -> Figure:
    """A small map for each pair of neighbouring layers."""
    maps = profile.transitions
    num_columns = min(len(maps), 4 if len(maps) <= 8 else 8)
    num_rows = -(-len(maps) // num_columns)
    figure, panels = new_figure(num_rows, num_columns, height=1.16 * num_rows * WIDTH / num_columns + 0.9)
    flat = [axes for row in panels for axes in row]
    limit = max(0.5, min(3.0, max(abs(lift) for cells in maps for row in cells for lift in row)))
    image: Any = None
    layers = [layer for layer in profile.layers if layer.transition_bits is not None]
    for axes, layer, cells in zip(flat, layers, maps, strict=False):
        image = axes.imshow(cells, cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="none", aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{layer.layer_idx} → {layer.layer_idx + 1}\n{layer.transition_bits:.3f} bits", fontsize=8.5)
    for axes in flat[len(maps) :]:
        axes.set_axis_off()
    title = f"{clean(profile.model)}: from the expert here (row) to the one in the next layer (column)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    bar = figure.colorbar(image, ax=flat, location="bottom", shrink=0.6, aspect=45, pad=0.04)
    bar.set_label("how much more often than by chance, powers of 2 (0: as by chance)")
    return figure


def draw_spread(profile: ProfileFacts) -> Figure:
    """A dot for each layer, on a logarithmic scale."""
    figure, ((axes,),) = new_figure(1, 1, height=3.2)
    known = [(layer.layer_idx, layer.spread) for layer in profile.layers if layer.spread is not None]
    axes.plot(*zip(*known, strict=True), "o-", color=BLUE)
    axes.axhline(1, color=GREY, linewidth=0.9, linestyle="--")
    axes.annotate("1: neurons fire independently", (0, 1), (2, 3), textcoords="offset points", color=GREY)
    by_layer(axes, len(profile.layers))
    plain_log_scale(axes, [spread for _, spread in known])
    axes.set(
        ylabel="variance over that of\nindependent neurons",
        title=f"{clean(profile.model)}: how much the number of active neurons varies from token to token",
    )
    return figure


def draw_correlation(correlation: Correlation) -> Figure:
    """A cell for each pair of neurons, those side by side that fire together."""
    figure, ((axes,),) = new_figure(1, 1, height=6.0)
    image = axes.imshow(correlation.coefficients, cmap="PuOr_r", vmin=-1, vmax=1, interpolation="none")
    axes.set(xticks=[], yticks=[], xlabel="neurons", ylabel="neurons")
    axes.set_title(
        f"layer {correlation.layer_idx}, expert {correlation.expert_idx}: which of {len(correlation.neurons)} neurons "
        "fire together"
    )
    figure.colorbar(image, ax=axes, label="correlation (1: always together, 0: independent)", pad=0.02)
    return figure


def draw_predictors(layers: Sequence[PredictorLayer]) -> Figure:
    """Recall and precision above, ranks below."""
    figure, ((above,), (below,)) = new_figure(2, 1, height=6.0, ratios=[3, 2])
    for name, colour, marker in (("recall", BLUE, "o-"), ("precision", ORANGE, "s-")):
        values = [getattr(layer, name) for layer in layers]
        shares = [math.nan if value is None else 100 * value for value in values]
        above.plot(range(len(layers)), shares, marker, color=colour, label=name)
    above.set(ylabel="%", title="recall: firing neurons that are named; precision: named neurons that fire")
    above.margins(y=0.15)
    below.bar(range(len(layers)), [layer.rank for layer in layers], color=GREEN, width=0.7)
    below.set(ylabel="rank (width inside)", title="size of each layer's predictors")
    for axes in (above, below):
        by_layer(axes, len(layers))
    legend_below(above)
    return figure


def draw_placement(layers: Sequence[PlacementLayer]) -> Figure:
    """A bar for each layer: GPU, RAM, disk."""
    figure, ((axes,),) = new_figure(1, 1)
    base = [0.0] * len(layers)
    kinds = (("gpu", "GPU", ORANGE, ""), ("ram", "RAM", BLUE, "//"), ("disk", "disk", GREY, ".."))
    for field, label, colour, hatch in kinds:
        heights = [100 * getattr(layer, f"{field}_neurons") / _num_neurons(layer) for layer in layers]
        axes.bar(
            range(len(heights)), heights, bottom=base, color=colour, width=0.8, label=label, hatch=hatch,
            edgecolor="white", linewidth=0,
        )  # fmt: skip
        base = [low + height for low, height in zip(base, heights, strict=True)]
    by_layer(axes, len(base))
    axes.set(ylabel="% of the layer's neurons", ylim=(0, 100), title="where each layer's neurons lie")
    legend_below(axes)
    return figure


def draw_histograms(tensors: Sequence[TensorFacts]) -> Figure:
    """A panel for each tensor: how small its values are, layer by layer."""
    num_columns = min(2, len(tensors))
    num_rows = -(-len(tensors) // num_columns)
    figure, panels = new_figure(num_rows, num_columns, height=2.7 * num_rows + 0.5)
    flat = [axes for row in panels for axes in row]
    colours = layer_colours(len(HISTOGRAM_SHARES))
    for axes, tensor in zip(flat, tensors, strict=False):
        for place, (share, colour) in enumerate(zip(HISTOGRAM_SHARES, colours, strict=True)):
            sizes = [layer[place] for layer in tensor.magnitudes]
            axes.plot(range(len(sizes)), sizes, color=colour, label=f"{100 * share:.0f} %")
        by_layer(axes, len(tensor.magnitudes))
        axes.set(title=clean(tensor.tensor), ylabel="magnitude", yscale="log")
    for axes in flat[len(tensors) :]:
        axes.set_axis_off()
    figure.suptitle("magnitude that this share of a tensor's values does not exceed", x=0.01, ha="left", fontsize=11)
    figure.legend(*flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(HISTOGRAM_SHARES))
    return figure


def _num_neurons(layer: PlacementLayer) -> int:
    return max(1, layer.gpu_neurons + layer.ram_neurons + layer.disk_neurons)
