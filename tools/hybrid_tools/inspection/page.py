"""The report as one HTML page that needs nothing else: tables, pictures as inline SVG, no script, no foreign font.

Names come from files that nobody vouches for, so the template escapes everything but our own pictures, and the page
forbids scripts besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from hybrid_runtime.sizes import format_bytes
from hybrid_tools.inspection.facts import (
    FIRING_SHARES,
    HISTOGRAM_SHARES,
    PAPER_SHARE,
    Curve,
    LayerFacts,
    PlacementLayer,
    PopularityFacts,
    PredictorLayer,
    ProfileFacts,
    Report,
    TensorFacts,
)
from hybrid_tools.inspection.figures import REMEDY
from hybrid_tools.inspection.template import TEMPLATE

UNKNOWN = "–"  # noqa: RUF001  # the dash that a table shows for nothing
MOST_OPEN_ROWS = 16  # a longer table is folded
TENSORS = {
    "self_attn.h1": "input of the attention",
    "self_attn.h2": "input of o_proj",
    "mlp.h1": "input of the FFN",
    "mlp.h1.5": "SiLU(gate)",
    "mlp.h2": "input of down_proj",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of finished text; the first column names the row."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def is_long(self) -> bool:
        """Whether it is folded at first."""
        return len(self.rows) > MOST_OPEN_ROWS


@dataclass(frozen=True, slots=True)
class Section:
    """captions: by a picture's name, in order; those that were not drawn are left out."""

    title: str
    text: str
    captions: Mapping[str, str]
    tables: tuple[Table, ...] = ()


def render_page(report: Report, pictures: Mapping[str, str]) -> str:
    """A whole HTML document. pictures: <svg> elements of ours by name; none where matplotlib is absent."""
    sections = _sections(report)
    named = {name for section in sections for name in section.captions}
    others = {name: name for name in pictures if name not in named}
    if others:
        sections.append(Section("More pictures", "", others))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE).render(
        title=report.title,
        remarks=report.remarks,
        sections=sections,
        summary=_summary(report.profile) if report.profile is not None else {},
        pictures={name: Markup(svg) for name, svg in pictures.items()},  # noqa: S704  # drawn by figures.py, not read
        without_pictures="" if pictures else f"This page has no pictures; to get them: {REMEDY}, then run again.",
    )


def _sections(report: Report) -> list[Section]:
    sections = []
    if report.profile is not None:
        sections += _profile_sections(report.profile)
    if report.predictors:
        sections.append(_predictors(report.predictors))
    if report.placement:
        sections.append(_placement(report.placement))
    if report.popularity is not None:
        sections.append(_popularity(report.popularity))
    if report.histograms:
        sections.append(_histograms(report.histograms))
    return sections


def _summary(profile: ProfileFacts) -> dict[str, str]:
    neurons = profile.num_experts * profile.intermediate_size
    summary = {
        "Model": profile.model,
        "Layers": f"{len(profile.layers)}, each of {neurons:,} neurons",
        "Counted": f"{profile.num_tokens:,} tokens of {profile.num_texts} text{'' if profile.num_texts == 1 else 's'}",
        "Exact zeros": f"{_percent(profile.zero_share)} of all values, mean over layers",
    }
    if profile.is_mixture:
        summary["Experts"] = (
            f"{profile.num_experts} a layer, each of {profile.intermediate_size:,} neurons; "
            f"{profile.num_experts_per_tok:.3g} a token"
        )
    if profile.firing is not None:
        needed = profile.firing.needed[FIRING_SHARES.index(PAPER_SHARE)]
        summary["Concentration"] = (
            f"{_percent(needed)} of the model's neurons make {_whole_percent(PAPER_SHARE)} of all firings; "
            f"{_percent(profile.firing.dead)} never fired"
        )
    return summary


def _profile_sections(profile: ProfileFacts) -> list[Section]:
    sections = [_sparsity(profile), _concentration(profile)]
    if profile.is_mixture:
        sections.append(_experts(profile))
    if any(layer.spread is not None for layer in profile.layers):
        sections.append(_co_activation(profile))
    return sections


def _sparsity(profile: ProfileFacts) -> Section:
    def extremes(layer: LayerFacts) -> tuple[str, str]:
        known = [share for share in layer.expert_zero_shares if share is not None]
        return (_percent(min(known)), _percent(max(known))) if known else (UNKNOWN, UNKNOWN)

    headers = ("layer", "exact zeros", *(("least sparse expert", "sparsest expert") if profile.is_mixture else ()))
    rows = tuple(
        (str(layer.layer_idx), _percent(layer.zero_share), *(extremes(layer) if profile.is_mixture else ()))
        for layer in profile.layers
    )
    return Section(
        "Sparsity",
        "A neuron fires for a token when its value after the activation is not exactly zero. Values of experts that a "
        "token did not go to do not count.",
        {"zeros": "Share of exact zeros among the values that each layer computed."},
        (Table("Exact zeros by layer", headers, rows),),
    )


def _concentration(profile: ProfileFacts) -> Section:
    def row(name: str, curve: Curve | None) -> tuple[str, ...]:
        if curve is None:
            return (name, *[UNKNOWN] * len(FIRING_SHARES), UNKNOWN)
        return (name, *map(_percent, curve.needed), _percent(curve.dead))

    headers = ("layer", *(f"neurons for {_whole_percent(share)} of firings" for share in FIRING_SHARES), "never fired")
    rows = (row("model", profile.firing), *(row(str(layer.layer_idx), layer.firing) for layer in profile.layers))
    return Section(
        "Concentration",
        f"How few neurons do most of the firing: the most frequent first, over all experts. PowerInfer's measure is "
        f"how many make {_whole_percent(PAPER_SHARE)} of the firings.",
        {
            "shares": "The share of all firings that the most frequent neurons make.",
            "dead": "Neurons that never fired while the text was counted.",
        },
        (Table("Shares of the neurons", headers, rows),),
    )


def _experts(profile: ProfileFacts) -> Section:
    most = math.log2(profile.num_experts)
    rows = tuple(
        (
            str(layer.layer_idx),
            str(max(range(len(layer.expert_shares)), key=layer.expert_shares.__getitem__)),
            _percent(max(layer.expert_shares)),
            _percent(min(layer.expert_shares)),
            _number(layer.expert_entropy, 3),
            _number(layer.transition_bits, 3),
        )
        for layer in profile.layers
    )
    headers = (
        "layer",
        "busiest expert",
        "its share of visits",
        "least busy one's",
        "entropy, bits",
        "to the next, bits",
    )
    return Section(
        "Experts",
        f"Where the tokens go. Entropy is {most:.3g} bits where all {profile.num_experts} experts get alike, and 0 "
        f"where one gets all; an even share would be {_percent(1 / profile.num_experts)} of the visits. 'To the next' "
        "is how much the expert of a token tells of its expert in the following layer: 0 bits where it tells nothing.",
        {
            "experts": "How often each expert is chosen.",
            "transitions": "Pairs of experts in consecutive layers, against what chance would give: 0 as chance, 1 "
            "twice as often.",
        },
        (Table("Routing by layer", headers, rows),),
    )


def _co_activation(profile: ProfileFacts) -> Section:
    rows = tuple((str(layer.layer_idx), _number(layer.spread, 2)) for layer in profile.layers)
    captions = {"spread": "Variance of the number of neurons that fire for a token, over that of independent neurons."}
    if (correlation := profile.correlation) is not None:
        captions["correlation"] = (
            f"Correlation of {len(correlation.neurons)} neurons of expert {correlation.expert_idx} in layer "
            f"{correlation.layer_idx}, where neurons fire together most."
            if profile.is_mixture
            else f"Correlation of {len(correlation.neurons)} neurons of layer {correlation.layer_idx}, where neurons "
            "fire together most."
        )
    return Section(
        "Neurons that fire together",
        "If neurons fired independently of each other, the number that fire for a token would vary by chance alone: a "
        "ratio of 1. The larger it is, the more tokens differ in how much they need.",
        captions,
        (Table("Spread by layer", ("layer", "variance over that of independent neurons"), rows),),
    )


def _predictors(layers: Sequence[PredictorLayer]) -> Section:
    rows = tuple(
        (
            str(layer.layer_idx),
            layer.kind,
            str(layer.rank),
            _percent(layer.recall),
            _percent(layer.precision),
            _percent(layer.predicted_density),
            _percent(layer.true_density),
            format_bytes(layer.num_bytes),
        )
        for layer in layers
    )
    headers = ("layer", "kind", "rank", "recall", "precision", "named", "firing", "size")
    return Section(
        "Predictors",
        f"Recall: of the neurons that fire, how many are named. Precision: of the named, how many fire. Together they "
        f"take {format_bytes(sum(layer.num_bytes for layer in layers))}.",
        {"predictors": "Recall and precision on text that nothing was trained on, and ranks."},
        (Table("Predictors by layer", headers, rows),),
    )


def _placement(layers: Sequence[PlacementLayer]) -> Section:
    def row(name: str, counts: Sequence[int], merge: str) -> tuple[str, ...]:
        total = max(1, sum(counts))
        return (name, *(f"{count:,} ({_percent(count / total)})" for count in counts), merge)

    counts = [(layer.gpu_neurons, layer.ram_neurons, layer.disk_neurons) for layer in layers]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    by_layer = [row(str(layer.layer_idx), each, layer.merge) for layer, each in zip(layers, counts, strict=True)]
    return Section(
        "Placement",
        "Where the neurons lie, over all experts. Merge: which results the GPU and the CPU add up.",
        {"placement": "Share of each layer's neurons on the GPU, in RAM and on disk."},
        (
            Table(
                "Neurons by layer",
                ("layer", "GPU", "RAM", "disk", "merge"),
                (row("model", totals, UNKNOWN), *by_layer),
            ),
        ),
    )


def _popularity(popularity: PopularityFacts) -> Section:
    rows = tuple(
        (str(layer_idx), " ".join(map(str, order)), str(1 + popularity.places[layer_idx][order[0]]))
        for layer_idx, order in enumerate(popularity.order)
    )
    return Section(
        "Published popularity of experts",
        f"An order of all {popularity.num_layers * popularity.num_experts} experts of {popularity.num_layers} layers, "
        "the most popular first, as others have published it; it has no counts.",
        {"popularity": "The place of each expert in the whole order, 1 for the most popular."},
        (Table("Experts by layer", ("layer", "experts, most popular first", "the first one's place of all"), rows),),
    )


def _histograms(tensors: Sequence[TensorFacts]) -> Section:
    middle = HISTOGRAM_SHARES.index(0.5)
    rows = tuple(
        (str(layer_idx), *(f"{tensor.magnitudes[layer_idx][middle]:.4g}" for tensor in tensors))
        for layer_idx in range(len(tensors[0].magnitudes))
    )
    headers = ("layer", *(f"{tensor.tensor} ({TENSORS.get(tensor.tensor, 'unknown')})" for tensor in tensors))
    return Section(
        "Published activations",
        "Dropping all values below a magnitude makes a dense model sparse, at a price. These are the magnitudes that a "
        "given share of the values does not exceed, from histograms that others have published.",
        {"histograms": "Magnitudes by tensor and layer."},
        (Table("Half of the values are no larger than", headers, rows),),
    )


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"
