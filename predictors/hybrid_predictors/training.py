"""Training the low-rank predictor of one feed-forward network on a sample of its inputs and of what fired then.

Binary cross-entropy with positives weighted up, because a missed neuron costs the model and a named one too many only
time; weights that put the wanted threshold near logit 0 let a small network spend itself where it is decided.
After each epoch the validation half is looked at: where it stops improving the step is halved, and after a few
halvings training ends with the best weights seen. Weights meet the inputs as their row format will round them,
which gradients pass straight through: rounding to q4 only afterwards costs a tenth more named neurons. The same sample,
options and thread count give the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.thresholds import curve

LEAST_GAIN = 0.002  # of the validation cost: less is no improvement
INITIAL_SIZE = 0.1  # of the logits, so that no token begins far off


@dataclass(frozen=True, slots=True)
class Sample:
    """inputs: float32 [n, H]; active: bool [n, I], which neurons fired."""

    inputs: torch.Tensor
    active: torch.Tensor

    def split(self, share: float) -> tuple[Sample, Sample]:
        """The first tokens, and the last `share` of them. The sample is in random order already."""
        count = len(self.inputs) - max(1, round(len(self.inputs) * share)) if len(self.inputs) > 1 else len(self.inputs)
        return Sample(self.inputs[:count], self.active[:count]), Sample(self.inputs[count:], self.active[count:])


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """rank: width of the hidden layer; row_format: that the weights will be packed in; recall: at which validation
    counts the neurons named; has_relu: False for Deja Vu's linear kind. patience: epochs without gain before the step
    is halved, which happens num_halvings times.
    """

    rank: int
    row_format: RowFormat
    recall: float = 0.97
    has_relu: bool = True
    max_epochs: int = 100
    batch_size: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    positive_weight: float = 10.0
    patience: int = 3
    num_halvings: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainedMlp:
    """fc1: float32 [rank, H]; fc2: float32 [I, rank]; on the row format's levels. cost: neurons named in validation for
    one that fires.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    num_epochs: int
    cost: float


OnEpoch = Callable[[int, float], None]
"""Gets the number of epochs done and the validation cost."""


def train_mlp(
    sample: Sample,
    validation: Sample,
    options: TrainingOptions,
    start: TrainedMlp | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainedMlp:
    """The weights with the lowest validation cost. start: of a lower rank, which is grown.

    A sample without tokens, or in which nothing fires, trains nothing and gives weights whose logits are all 0.
    """
    generator = torch.Generator().manual_seed(options.seed)
    fc1, fc2 = _initial(sample, options, start, generator)
    best = TrainedMlp(fc1.clone(), fc2.clone(), 0, float("inf"))
    if not sample.active.any():
        return TrainedMlp(fc1, torch.zeros_like(fc2), 0, 1.0)
    parameters = [torch.nn.Parameter(fc1), torch.nn.Parameter(fc2)]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    without_gain, halvings = 0, 0
    for epoch in range(1, options.max_epochs + 1):
        _one_epoch(sample, options, parameters, optimizer, generator)
        cost = _cost(validation if len(validation.inputs) else sample, parameters, options)
        if on_epoch is not None:
            on_epoch(epoch, cost)
        if cost < best.cost * (1 - LEAST_GAIN):
            without_gain = 0
        else:
            without_gain += 1
        if cost < best.cost:
            fc1, fc2 = (_rounded(each.detach(), options.row_format).clone() for each in parameters)
            best = TrainedMlp(fc1, fc2, epoch, cost)
        if without_gain >= options.patience:
            halvings, without_gain = halvings + 1, 0
            if halvings > options.num_halvings:
                break
            for group in optimizer.param_groups:
                group["lr"] /= 2
    return best


def mlp_logits(inputs: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, *, has_relu: bool) -> torch.Tensor:
    """inputs: [n, H] -> [n, I], in float32, without any rounding."""
    hidden = inputs @ fc1.T
    return (torch.relu(hidden) if has_relu else hidden) @ fc2.T


def _initial(
    sample: Sample, options: TrainingOptions, start: TrainedMlp | None, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_size, num_neurons = sample.inputs.shape[1], sample.active.shape[1]
    size = float(sample.inputs.square().mean().sqrt()) if len(sample.inputs) else 1.0
    fc1 = torch.randn(options.rank, hidden_size, generator=generator) / (max(size, 1e-6) * hidden_size**0.5)
    fc2 = torch.randn(num_neurons, options.rank, generator=generator) * INITIAL_SIZE / options.rank**0.5
    if start is not None:
        rank = min(options.rank, len(start.fc1))
        fc1[:rank], fc2[:, :rank] = start.fc1[:rank], start.fc2[:, :rank]
    return fc1, fc2


def _one_epoch(
    sample: Sample,
    options: TrainingOptions,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    weight = torch.tensor(options.positive_weight)
    order = torch.randperm(len(sample.inputs), generator=generator)
    for batch in torch.split(order, options.batch_size):
        weights = [_rounded_straight_through(each, options.row_format) for each in parameters]
        logits = mlp_logits(sample.inputs[batch], *weights, has_relu=options.has_relu)
        loss = binary_cross_entropy_with_logits(logits, sample.active[batch].float(), pos_weight=weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()


def _rounded_straight_through(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return weights + (_rounded(weights.detach(), row_format) - weights).detach()


def _rounded(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """What packing and unpacking makes of the weights."""
    if row_format.kind == "f32":
        return weights
    return dequantize_rows(quantize_rows(weights, row_format), weights.shape[1], row_format)


@torch.no_grad()
def _cost(validation: Sample, parameters: list[torch.nn.Parameter], options: TrainingOptions) -> float:
    """Neurons named at the recall, for one that fires."""
    weights = [_rounded(each, options.row_format) for each in parameters]
    logits = mlp_logits(validation.inputs, *weights, has_relu=options.has_relu)
    reached = curve([logits], [validation.active])
    return reached.at(reached.for_recall(options.recall)).density_ratio
