"""Everything that a report says, as numbers: what tables print, pictures draw and --json gives.

Computed from a profile's counts, predictors' measurements, a placement, and statistics of others; each may be absent.
A number that nobody can know (of an expert that got no token, of pairs that were not counted) is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from hybrid_runtime.profiling.profile import LayerCounts, Profile
from hybrid_tools.foreign_statistics import ActivationHistograms, ExpertPopularity

FIRING_SHARES = (0.5, 0.8, 0.95)  # of all firings: how few neurons make them
PAPER_SHARE = 0.8  # PowerInfer's figure 5
CURVE = tuple((idx / 100) ** 2 for idx in range(101))  # shares of neurons; dense where the curve is steep
MOST_CORRELATED = 64  # neurons side by side that a picture can show
HISTOGRAM_SHARES = (0.25, 0.5, 0.75, 0.9)  # of values; the outermost bins end at 0.98

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Neurons, the most frequent first. cumulative: the share of firings that the CURVE shares of them make; needed:
    the share of them that makes each of FIRING_SHARES; dead: the share that never fired.
    """

    cumulative: tuple[float, ...]
    needed: tuple[float, ...]
    dead: float


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer. zero_share: of values that are exactly zero, by expert too; spread: `Profile.spread`.

    expert_shares: of the tokens' visits; expert_entropy: bits of these, log2(E) at most; transition_bits: what the
    expert of a token here tells of one in the next layer. A dense layer has none of these.
    """

    layer_idx: int
    zero_share: float
    expert_zero_shares: tuple[float | None, ...]
    firing: Curve | None
    spread: float | None
    expert_shares: tuple[float, ...]
    expert_entropy: float | None
    transition_bits: float | None


@dataclass(frozen=True, slots=True)
class Correlation:
    """Of the watched neurons of one network, in an order that brings together what fires together: [K, K]."""

    layer_idx: int
    expert_idx: int
    neurons: tuple[int, ...]
    coefficients: Matrix


@dataclass(frozen=True, slots=True)
class ProfileFacts:
    """transitions: by layer but the last, log2 of how much more often a pair of experts follows than by chance."""

    model: str
    num_tokens: int
    num_texts: int
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: float
    zero_share: float
    firing: Curve | None
    layers: tuple[LayerFacts, ...]
    transitions: tuple[Matrix, ...]
    correlation: Correlation | None

    @property
    def is_mixture(self) -> bool:
        """Whether tokens choose experts."""
        return self.num_experts > 1

    def to_json(self) -> dict[str, object]:
        """Plain values, without the matrices: the profile itself has their counts."""
        values = asdict(self)
        del values["transitions"], values["correlation"]
        return values


@dataclass(frozen=True, slots=True)
class PredictorLayer:
    """One layer's predictors. Densities are shares of the neurons: named, and firing; None where nobody measured."""

    layer_idx: int
    kind: str
    rank: int
    recall: float | None
    precision: float | None
    predicted_density: float | None
    true_density: float | None
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PlacementLayer:
    """Where one layer's neurons lie, over all experts, and where both sides' results merge: none, output, hidden."""

    layer_idx: int
    gpu_neurons: int
    ram_neurons: int
    disk_neurons: int
    merge: str


@dataclass(frozen=True, slots=True)
class PopularityFacts:
    """Published order of experts. places: [L, E], 0 for the model's most popular one; order: by layer, best first."""

    num_layers: int
    num_experts: int
    places: tuple[tuple[int, ...], ...]
    order: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """Published values of one tensor. magnitudes: by layer, what each of HISTOGRAM_SHARES of them does not exceed."""

    tensor: str
    num_values: int
    magnitudes: Matrix


@dataclass(frozen=True, slots=True)
class Report:
    """All that one page says. remarks: what is not there, and what would make it."""

    title: str
    profile: ProfileFacts | None = None
    predictors: tuple[PredictorLayer, ...] = ()
    placement: tuple[PlacementLayer, ...] = ()
    popularity: PopularityFacts | None = None
    histograms: tuple[TensorFacts, ...] = ()
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values, with what the shares in lists are of."""
        return {
            "title": self.title,
            "firing_shares": FIRING_SHARES,
            "curve_shares": CURVE,
            "histogram_shares": HISTOGRAM_SHARES,
            "profile": self.profile and self.profile.to_json(),
            "predictors": [asdict(layer) for layer in self.predictors],
            "placement": [asdict(layer) for layer in self.placement],
            "popularity": self.popularity and asdict(self.popularity),
            "histograms": [asdict(tensor) for tensor in self.histograms],
            "remarks": self.remarks,
        }


def profile_facts(profile: Profile) -> ProfileFacts:
    """What the counts say."""
    num_experts = len(profile.layers[0].tokens)
    layers = tuple(_layer_facts(profile, idx) for idx in range(len(profile.layers)))
    return ProfileFacts(
        model=profile.model,
        num_tokens=profile.num_tokens,
        num_texts=len(profile.texts),
        intermediate_size=profile.layers[0].fired.shape[1],
        num_experts=num_experts,
        num_experts_per_tok=profile.num_experts_per_tok,
        zero_share=profile.mean_zero_share,
        firing=firing_curve(torch.cat([layer.fired.flatten() for layer in profile.layers])),
        layers=layers,
        transitions=tuple(_lift(layer.follows) for layer in profile.layers if layer.follows.any()),
        correlation=_correlation(profile, layers),
    )


def firing_curve(fired: torch.Tensor) -> Curve | None:
    """fired: int64 [n]; None where nothing fired."""
    total = int(fired.sum())
    if not total:
        return None
    counts = torch.cat([torch.zeros(1, dtype=torch.int64), fired.sort(descending=True).values.cumsum(0)]).double()
    cumulative = [float(counts[round(share * len(fired))]) / total for share in CURVE]
    needed = [float((counts < share * total).sum()) / len(fired) for share in FIRING_SHARES]
    return Curve(tuple(cumulative), tuple(needed), float((fired == 0).double().mean()))


def popularity_facts(popularity: ExpertPopularity) -> PopularityFacts:
    """Of a published order."""
    places = popularity.places()
    return PopularityFacts(
        popularity.num_layers,
        popularity.num_experts,
        tuple(tuple(row) for row in places.tolist()),
        tuple(tuple(row) for row in places.argsort(axis=1).tolist()),
    )


def histogram_facts(histograms: ActivationHistograms) -> tuple[TensorFacts, ...]:
    """Of published histograms, one entry a tensor."""
    return tuple(
        TensorFacts(
            tensor,
            layers[0].num_values,
            tuple(tuple(layer.magnitude_of(share) for share in HISTOGRAM_SHARES) for layer in layers),
        )
        for tensor, layers in histograms.by_tensor.items()
    )


def entropy_bits(shares: torch.Tensor) -> float:
    """Of shares that sum to 1, of any shape."""
    some = shares[shares > 0]
    return float(-(some * some.log2()).sum())


def _layer_facts(profile: Profile, layer_idx: int) -> LayerFacts:
    layer = profile.layers[layer_idx]
    is_mixture = len(layer.tokens) > 1
    spread = profile.spread(layer_idx) if len(profile.watched) else math.nan  # imported counts have no pairs
    shares = layer.tokens.double() / max(1, int(layer.tokens.sum()))
    return LayerFacts(
        layer_idx=layer_idx,
        zero_share=profile.zero_share(layer_idx),
        expert_zero_shares=_expert_zero_shares(layer),
        firing=firing_curve(layer.fired.flatten()),
        spread=spread if math.isfinite(spread) else None,
        expert_shares=tuple(shares.tolist()) if is_mixture else (),
        expert_entropy=entropy_bits(shares) if is_mixture else None,
        transition_bits=_mutual_bits(layer.follows) if layer.follows.any() else None,
    )


def _expert_zero_shares(layer: LayerCounts) -> tuple[float | None, ...]:
    means = layer.frequencies().mean(1).tolist()
    return tuple(1 - mean if tokens else None for mean, tokens in zip(means, layer.tokens.tolist(), strict=True))


def _mutual_bits(follows: torch.Tensor) -> float:
    joint = follows.double() / follows.sum()
    return max(0.0, entropy_bits(joint.sum(0)) + entropy_bits(joint.sum(1)) - entropy_bits(joint))


def _lift(follows: torch.Tensor) -> Matrix:
    """log2 of p(i, j) / (p(i) p(j)); half a token where none was seen, 0 where an expert got no token at all."""
    counts = follows.double()
    total = counts.sum()
    expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / total
    lift = (counts.clamp(min=0.5) / expected.clamp(min=0.5)).log2()
    return tuple(map(tuple, torch.where(expected > 0, lift, 0.0).tolist()))


def _correlation(profile: Profile, layers: Sequence[LayerFacts]) -> Correlation | None:
    """Of the busiest expert of the layer whose neurons fire together most."""
    spreads = [-1.0 if layer.spread is None else layer.spread for layer in layers]
    layer_idx = spreads.index(max(spreads))
    layer = profile.layers[layer_idx]
    expert_idx = int(layer.tokens.argmax())
    tokens = float(layer.tokens[expert_idx])
    fired = layer.fired[expert_idx, profile.watched].double()
    telling = torch.minimum(fired, tokens - fired)  # a neuron that always or never fires correlates with nothing
    chosen = telling.argsort(descending=True, stable=True)[:MOST_CORRELATED]
    chosen = chosen[telling[chosen] > 0].sort().values
    if max(spreads) < 0 or len(chosen) < 2:
        return None
    fired = fired[chosen]
    together = layer.co_fired[expert_idx][chosen][:, chosen].double()
    deviation = (fired * (tokens - fired)).sqrt()
    coefficients = (tokens * together - fired.outer(fired)) / deviation.outer(deviation)
    order = torch.linalg.eigh(coefficients).eigenvectors[:, -1].argsort(stable=True)
    neurons = profile.watched[chosen][order]
    matrix = coefficients[order][:, order].clamp(-1, 1)
    return Correlation(layer_idx, expert_idx, tuple(neurons.tolist()), tuple(map(tuple, matrix.tolist())))
