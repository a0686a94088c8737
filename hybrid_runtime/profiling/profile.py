"""A profile: how often each neuron fired on a text, to which experts the tokens went, and which neurons fired together.

A neuron fires for a token when its value after the activation is not exactly zero. Everything is a count, so that
profiles of the same model over different texts add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import UsageError

CO_FIRED_BYTES = 8 << 20  # of pair counts in the whole model, in memory


@dataclass(frozen=True, slots=True)
class TextDigest:
    """A text that was read. sha256: of its files' digests, in order; num_tokens: how many of it were counted."""

    sha256: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LayerCounts:
    """One layer, int64 throughout. A dense layer is one expert that gets every token.

    fired: [E, I]; tokens: [E], that each expert got; active_squares: [E], sum over tokens of the squared number of
    neurons that fired, whose spread tells how much neurons fire together; co_fired: [E, K, K], how often each pair of
    the watched neurons fired for the same token; follows: [E, E], tokens that went to expert i here and to expert j in
    the next layer, [0, 0] where there is no such layer.
    """

    fired: torch.Tensor
    tokens: torch.Tensor
    active_squares: torch.Tensor
    co_fired: torch.Tensor
    follows: torch.Tensor

    def frequencies(self) -> torch.Tensor:
        """float64 [E, I]: how often a neuron fires for a token that its expert got; 0 for an expert that got none."""
        return self.fired.double() / self.tokens.clamp(min=1).unsqueeze(1)

    def __add__(self, other: LayerCounts) -> LayerCounts:
        """Counts over both texts."""
        return LayerCounts(*(getattr(self, name) + getattr(other, name) for name in LAYER_FIELDS))


LAYER_FIELDS = ("fired", "tokens", "active_squares", "co_fired", "follows")


@dataclass(frozen=True, slots=True)
class Profile:
    """model: its name; model_digest: of the store that was profiled; window: tokens that one token can look back on.

    watched: int64 [K], the neurons whose pairs are counted. held_out: int32 [n, window], pieces of the text that were
    not counted, for testing what is made from the counts.
    """

    model: str
    model_digest: str
    texts: tuple[TextDigest, ...]
    window: int
    watched: torch.Tensor
    layers: tuple[LayerCounts, ...]
    held_out: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return sum(text.num_tokens for text in self.texts)

    @property
    def num_experts_per_tok(self) -> float:
        """Experts that a token goes to in a layer; 1 in a dense model."""
        return float(self.layers[0].tokens.sum()) / max(1, self.num_tokens)

    def expected_firings(self, layer_idx: int) -> torch.Tensor:
        """float64 [E, I]: how often each neuron fires per token, whichever experts the token goes to."""
        return self.layers[layer_idx].fired.double() / max(1, self.num_tokens)

    def zero_share(self, layer_idx: int) -> float:
        """Share of exact zeros among the values that the layer computed."""
        layer = self.layers[layer_idx]
        return 1 - float(layer.fired.sum()) / max(1.0, float(layer.tokens.sum()) * layer.fired.shape[1])

    @property
    def mean_zero_share(self) -> float:
        """Mean over layers."""
        return sum(map(self.zero_share, range(len(self.layers)))) / len(self.layers)

    def spread(self, layer_idx: int) -> float:
        """Variance of the number of neurons that fire for a token, over that of neurons which fire independently.

        Mean over experts, by the tokens that they got. 1: nothing fires together; NaN where nothing ever fires.
        """
        layer = self.layers[layer_idx]
        seen = layer.tokens.double().clamp(min=1)
        variance = layer.active_squares / seen - (layer.fired.sum(1) / seen).square()
        frequencies = layer.frequencies()
        independent = (frequencies * (1 - frequencies)).sum(1)
        return float((variance * layer.tokens).sum() / (independent * layer.tokens).sum())


def empty_layers(config: ModelConfig, num_watched: int) -> tuple[LayerCounts, ...]:
    """Counts of nothing."""
    experts, neurons = max(1, config.num_experts), config.intermediate_size
    last = config.num_hidden_layers - 1

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    return tuple(
        LayerCounts(
            fired=zeros(experts, neurons),
            tokens=zeros(experts),
            active_squares=zeros(experts),
            co_fired=zeros(experts, num_watched, num_watched),
            follows=zeros(*([experts, experts] if config.num_experts and layer_idx < last else [0, 0])),
        )
        for layer_idx in range(config.num_hidden_layers)
    )


def watched_neurons(config: ModelConfig) -> torch.Tensor:
    """int64 [K]: the neurons whose pairs are counted, evenly spaced, as many as CO_FIRED_BYTES allow."""
    networks = config.num_hidden_layers * max(1, config.num_experts)
    most = int((CO_FIRED_BYTES / 8 / networks) ** 0.5)
    count = max(1, min(config.intermediate_size, most))
    return torch.arange(count) * config.intermediate_size // count


def merged(profiles: Mapping[str, Profile]) -> Profile:
    """One profile over all texts, from profiles by the names that messages call them.

    Raise UsageError for another model, another window, or a text that comes twice.
    """
    (first_name, first), *others = profiles.items()
    named = {text.sha256: first_name for text in first.texts}
    texts, layers, held_out = first.texts, first.layers, first.held_out
    for name, other in others:
        if other.model_digest != first.model_digest:
            raise UsageError(
                f"{name}: is of {other.model} ({other.model_digest[:12]}), {first_name} of {first.model} "
                f"({first.model_digest[:12]}); merge profiles of the same store"
            )
        if other.window != first.window:
            raise UsageError(
                f"{name}: looks back on {other.window} tokens, {first_name} on {first.window}; merge profiles of the "
                "same --window"
            )
        for text in other.texts:
            if text.sha256 in named:
                raise UsageError(
                    f"{name}: is of a text that {named[text.sha256]} is of, which would count twice; leave one out"
                )
        named |= {text.sha256: name for text in other.texts}
        texts += other.texts
        layers = tuple(ours + theirs for ours, theirs in zip(layers, other.layers, strict=True))
        held_out = torch.cat([held_out, other.held_out])
    return Profile(first.model, first.model_digest, texts, first.window, first.watched, layers, held_out)
