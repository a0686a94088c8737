"""Training the low-rank predictors of one layer on a sample of its inputs and of what fired then.

The experts of a layer read the same input, so their predictors share fc1: a direction that is looked at costs its bytes
once, and every expert gets more of them for the same memory. A dense layer is one expert.

Binary cross-entropy with positives weighted up, because a missed neuron costs the model and a named one too many only
time; weights that put the wanted threshold near logit 0 let a small network spend itself where it is decided. Weights
meet the inputs rounded to their row format's levels, which gradients pass straight through: rounding to q4 only
afterwards costs a tenth more named neurons. The step falls linearly; the weights of the epoch with the lowest cost on
the validation half count, and training ends early when that has not fallen for a while. The same sample, options and
number of threads give the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, pad

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_predictors.thresholds import Curve, curve

BATCH_SIZE = 512  # tokens
INITIAL_SIZE = 0.1  # of the logits, so that no token begins far off
MOST_VALIDATED = 1 << 24  # neurons times tokens, 64 MiB of logits
Q4_LEVELS = (-8.0, 7.0, -7.2)  # that a group's largest weight may fall on; beyond the last level it is cut off


@dataclass(frozen=True, slots=True)
class LayerSample:
    """inputs: float16 [n, H]; experts: int16 [n, k], which experts the tokens went to; active: uint8 [n, k, I / 8],
    which of their num_neurons neurons fired, lowest bit first.
    """

    inputs: torch.Tensor
    experts: torch.Tensor
    active: torch.Tensor
    num_neurons: int
    num_experts: int

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, tokens: torch.Tensor | slice) -> LayerSample:
        """Some of the tokens."""
        return LayerSample(
            self.inputs[tokens], self.experts[tokens], self.active[tokens], self.num_neurons, self.num_experts
        )

    def of_experts(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Expert, int64 [m] tokens that went there, bool [m, I] which of its neurons fired."""
        for expert_idx in range(self.num_experts):
            tokens, slots = (self.experts == expert_idx).nonzero(as_tuple=True)
            bits = self.active[tokens, slots].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1  # [m, I / 8, 8]
            yield expert_idx, tokens, bits.flatten(1)[:, : self.num_neurons].bool()

    def split(self, share: float) -> tuple[LayerSample, LayerSample]:
        """What to train on, and the last `share` of the tokens (in random order already), as many as are validated."""
        per_token = self.experts.shape[1] * self.num_neurons
        count = min(round(len(self) * share), MOST_VALIDATED // per_token)
        return self.take(slice(0, len(self) - count)), self.take(slice(len(self) - count, None))


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """rank: width of the hidden layer; row_format: that the weights will be packed in; recall: at which validation
    counts the neurons named; has_relu: False for Deja Vu's linear kind; patience: epochs without a lower cost.
    """

    rank: int
    row_format: RowFormat
    recall: float = 0.97
    has_relu: bool = True
    num_epochs: int = 16
    batch_size: int = BATCH_SIZE
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    positive_weight: float = 10.0
    patience: int = 12  # while the step is large, the cost wanders: 5 ended runs that had 6 to 9 % to gain
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TrainedLayer:
    """fc1: float32 [rank, H], all experts'; fc2: float32 [E, I, rank]; both on the row format's levels.

    cost: neurons named in validation for one that fires, at the recall; NaN where nothing was trained.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    num_epochs: int
    cost: float


OnEpoch = Callable[[int, float], None]
"""Gets the number of epochs done and the validation cost."""


def train_layer(
    sample: LayerSample,
    validation: LayerSample,
    options: TrainingOptions,
    on_epoch: OnEpoch | None = None,
) -> TrainedLayer:
    """The weights with the lowest validation cost. Where nothing fires, weights whose logits are all 0.

    Raises ValueError for a sample without tokens.
    """
    if len(sample) == 0:
        raise ValueError("the sample holds no token to train on")
    generator = torch.Generator().manual_seed(options.seed)
    parameters = _initial(sample, options, generator)
    best = TrainedLayer(parameters[0].detach().clone(), torch.zeros_like(parameters[1]), 0, float("nan"))
    if not sample.active.any():
        return best
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    num_steps = options.num_epochs * -(-len(sample) // options.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, num_steps)
    for epoch in range(1, options.num_epochs + 1):
        _one_epoch(sample, options, parameters, optimizer, schedule, generator)
        with torch.no_grad():
            fc1, fc2 = (_rounded(each, options.row_format).clone() for each in parameters)
        reached = layer_curve(validation if len(validation) else sample, fc1, fc2, has_relu=options.has_relu)
        cost = reached.at(reached.for_recall(options.recall)).density_ratio
        if on_epoch is not None:
            on_epoch(epoch, cost)
        if not cost >= best.cost:
            best = TrainedLayer(fc1, fc2, epoch, cost)
        if epoch - best.num_epochs >= options.patience:
            break
    return best


def mlp_logits(inputs: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor, *, has_relu: bool) -> torch.Tensor:
    """inputs: float32 [n, H]; fc1: [rank, H]; fc2: [I, rank] -> [n, I], without any rounding."""
    hidden = inputs @ fc1.T
    return (torch.relu(hidden) if has_relu else hidden) @ fc2.T


def layer_curve(sample: LayerSample, fc1: torch.Tensor, fc2: torch.Tensor, *, has_relu: bool) -> Curve:
    """What thresholds cost on the sample, in float32."""
    parts = [
        (mlp_logits(sample.inputs[tokens].float(), fc1, fc2[expert_idx], has_relu=has_relu), active)
        for expert_idx, tokens, active in sample.of_experts()
    ]
    return curve([logits for logits, _ in parts], [active for _, active in parts])


def _initial(
    sample: LayerSample, options: TrainingOptions, generator: torch.Generator
) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    hidden_size = sample.inputs.shape[1]
    size = max(float(sample.inputs[: options.batch_size].float().square().mean().sqrt()), 1e-6)
    fc1 = torch.randn(options.rank, hidden_size, generator=generator) / (size * hidden_size**0.5)
    fc2 = torch.randn(sample.num_experts, sample.num_neurons, options.rank, generator=generator)
    return torch.nn.Parameter(fc1), torch.nn.Parameter(fc2 * INITIAL_SIZE / options.rank**0.5)


def _one_epoch(
    sample: LayerSample,
    options: TrainingOptions,
    parameters: tuple[torch.nn.Parameter, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LinearLR,
    generator: torch.Generator,
) -> None:
    positive = torch.tensor(options.positive_weight)
    values = options.batch_size * sample.experts.shape[1] * sample.num_neurons
    order = torch.randperm(len(sample), generator=generator)
    for batch in torch.split(order, options.batch_size):
        fc1, fc2 = (_rounded_straight_through(each, options.row_format) for each in parameters)
        tokens_of_batch = sample.take(batch)
        inputs = tokens_of_batch.inputs.float()
        hidden = inputs @ fc1.T
        if options.has_relu:
            hidden = torch.relu(hidden)
        loss = torch.zeros(())
        for expert_idx, tokens, active in tokens_of_batch.of_experts():
            logits = hidden[tokens] @ fc2[expert_idx].T
            loss = loss + binary_cross_entropy_with_logits(logits, active.float(), pos_weight=positive, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        (loss / values).backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        schedule.step()


def _rounded_straight_through(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    return weights + (_rounded(weights.detach(), row_format) - weights).detach()


def _rounded(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """weights: [..., K] -> the nearest levels of the best of a few scales.

    Packing fits its scales by least squares, which takes several times as long and finds these very levels again.
    """
    if not row_format.is_quantized:
        return weights.bfloat16().float() if row_format.kind == "bf16" else weights
    columns = weights.shape[-1]
    padded = pad(weights, (0, row_format.padded_columns(columns) - columns))
    groups = padded.view(*padded.shape[:-1], -1, row_format.group)
    if row_format.kind == "q8":
        return _on_levels(groups, groups.abs().amax(-1, keepdim=True) / 127, 127).view(padded.shape)[..., :columns]
    extremes = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = _on_levels(groups, extremes / Q4_LEVELS[0], 7)
    errors = (best - groups).square().sum(-1, keepdim=True)
    for level in Q4_LEVELS[1:]:
        other = _on_levels(groups, extremes / level, 7)
        other_errors = (other - groups).square().sum(-1, keepdim=True)
        best = torch.where(other_errors < errors, other, best)
        errors = torch.minimum(errors, other_errors)
    return best.view(padded.shape)[..., :columns]


def _on_levels(groups: torch.Tensor, scales: torch.Tensor, highest: int) -> torch.Tensor:
    """The nearest of scale times -highest - 1 (-127 for q8) to highest."""
    levels = (groups / torch.where(scales == 0, 1.0, scales)).round()
    return levels.clamp(-highest - (highest == 7), highest) * scales
