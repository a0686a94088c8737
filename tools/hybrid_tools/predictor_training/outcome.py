"""What is asked of predictors, and what a round of training, or one of an earlier day, came to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.thresholds import Quality
from hybrid_runtime.store.predictor_files import LayerPredictors, PredictorHeader

FIRST_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class PredictorRequest:
    """recall: share of firing neurons to find; most_named: neurons named for one that fires; most_share: predictors'
    bytes over the neurons'; most_loss: relative increase of the perplexity. All hold in the end, or a miss is said.
    first_share: of those bytes, what the first round spends; the rest goes where it turns out to be missing.
    replaces: takes the place also of predictors that reach more of it.
    """

    recall: float
    most_named: float
    most_share: float
    most_loss: float
    row_format: RowFormat
    num_epochs: int
    has_relu: bool = True
    restarts: bool = False
    first_share: float = FIRST_SHARE
    replaces: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round came to, on held-out text. by_layer: qualities; loss: relative increase of the perplexity, and its
    standard error, NaN before they are measured; share: bytes over the neurons' bytes; share_of_time: of a decoded
    token's feed-forward networks.
    """

    header: PredictorHeader
    by_layer: tuple[Quality, ...]
    loss: float
    loss_error: float
    share: float
    share_of_time: float = math.nan

    @property
    def total(self) -> Quality:
        """Over all layers."""
        total = self.by_layer[0]
        for quality in self.by_layer[1:]:
            total = total + quality
        return total

    def misses(self, request: PredictorRequest) -> list[str]:
        """What does not hold, in words."""
        total = self.total
        found = []
        if total.recall < request.recall:
            found.append(f"recall {total.recall:.4f}, wanted {request.recall:g}")
        if total.density_ratio > request.most_named:
            found.append(f"{total.density_ratio:.2f} neurons named for one that fires, wanted {request.most_named:g}")
        if self.loss > request.most_loss:
            found.append(f"perplexity {100 * self.loss:+.2f} %, wanted at most +{100 * request.most_loss:g} %")
        if self.share > request.most_share:
            found.append(
                f"{100 * self.share:.1f} % of the neurons' bytes, wanted at most {100 * request.most_share:g} %"
            )
        return found


def outcome_of(header: PredictorHeader, neuron_bytes: int) -> Outcome | None:
    """What finished predictors came to when they were made; None where nobody measured that.

    neuron_bytes: of all layers' neurons.
    """
    if header.perplexity is None or header.exact_perplexity is None:
        return None
    qualities = [_measured(layer) for layer in header.layers]
    by_layer = tuple(quality for quality in qualities if quality is not None)
    if len(by_layer) < len(qualities):
        return None
    loss = header.perplexity / header.exact_perplexity - 1
    return Outcome(header, by_layer, loss, math.nan, header.num_bytes / neuron_bytes)


def _measured(layer: LayerPredictors) -> Quality | None:
    """Per neuron and token that was seen, of which every layer saw as many."""
    if layer.recall is None or layer.predicted_density is None or layer.true_density is None:
        return None
    return Quality(layer.recall * layer.true_density, layer.true_density, layer.predicted_density, 1.0)
