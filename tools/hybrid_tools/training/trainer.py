"""The training loop: batches in, weights out, every step a function of the recipe and the step before.

It knows tensors and files of its own run; what the user sees goes through `OnStep`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import NumericsError
from hybrid_tools.training.checkpoint import MOMENTS, State, save_state
from hybrid_tools.training.corpus import Batches
from hybrid_tools.training.mixture import load_balancing_loss
from hybrid_tools.training.network import forward
from hybrid_tools.training.recipe import Optimisation
from hybrid_tools.training.schedule import l1_weight, learning_rate


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step. loss: nats a token; balance, l1: the penalties before their weights; zeros: share of exact zeros
    among the hidden values of the networks that were computed; gradient_norm: before clipping.
    """

    step: int
    loss: float
    balance: float
    l1: float
    zeros: float
    learning_rate: float
    l1_weight: float
    gradient_norm: float


OnStep = Callable[[StepResult], None]


@dataclass(slots=True)
class HiddenSums:
    """What a forward pass adds up over its hidden vectors: norms with their gradient, and zeros."""

    keeps_norms: bool
    norm: torch.Tensor | None = None
    num_rows: int = 0
    zeros: list[torch.Tensor] = field(default_factory=list)
    num_values: int = 0

    def __call__(self, layer_idx: int, expert_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        """Add one expert's rows; hidden: [T, I] goes on unchanged."""
        del layer_idx, expert_idx
        if self.keeps_norms:
            norm = hidden.abs().sum(dtype=torch.float32)
            self.norm = norm if self.norm is None else self.norm + norm
        self.num_rows += hidden.shape[0]
        self.num_values += hidden.numel()
        self.zeros.append(hidden.detach().count_nonzero())
        return hidden

    @property
    def mean_norm(self) -> torch.Tensor | None:
        """Mean L1 norm of a hidden vector, over layers, tokens and their experts."""
        return None if self.norm is None else self.norm / self.num_rows

    @property
    def zero_share(self) -> float:
        """Share of hidden values that are exactly zero."""
        return 1.0 - sum(int(each) for each in self.zeros) / self.num_values


class Trainer:
    """A model and its optimiser between two steps."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, torch.Tensor],
        optimisation: Optimisation,
        batches: Batches,
        device: torch.device,
    ) -> None:
        self.config = config
        self.num_steps_done = 0
        self._optimisation = optimisation
        self._batches = batches
        self._device = device
        self.weights = {name: torch.nn.Parameter(weight.to(device)) for name, weight in weights.items()}
        self._optimiser = make_optimiser(self.weights, optimisation)

    def restore(self, state: State) -> None:
        """Go on from a checkpoint."""
        self.num_steps_done = state.num_steps
        for name, parameter in self.weights.items():
            with torch.no_grad():
                parameter.copy_(state.weights[name])
            self._optimiser.state[parameter] = {
                "step": torch.tensor(float(state.num_steps), device=self._device),
                **{moment: state.moments[moment][name].to(self._device) for moment in MOMENTS},
            }

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of what is done."""
        moments = {
            moment: {name: self._optimiser.state[weight][moment] for name, weight in self.weights.items()}
            for moment in MOMENTS
        }
        return save_state(folder, State(self.num_steps_done, self.weights, moments))

    def step(self) -> StepResult:
        """One step. Raise NumericsError before the weights change when the loss or a gradient is not a number."""
        step_idx = self.num_steps_done
        optimisation = self._optimisation
        penalty = l1_weight(optimisation, step_idx)
        tokens = torch.from_numpy(self._batches.step(step_idx).astype("int64")).to(self._device)
        micro_batches = torch.split(tokens, optimisation.micro_batch)
        sums = [self._backward(each, penalty, len(micro_batches)) for each in micro_batches]
        loss, balance, l1, zeros = (sum(column) / len(sums) for column in zip(*sums, strict=True))
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), optimisation.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"step {step_idx + 1}: the loss is {loss} and the gradient's norm {norm}; nothing was changed, and "
                "what was saved before is untouched; begin a new run with a smaller --lr, or write the newest "
                "checkpoint out with --export and go on --from it"
            )
        rate = learning_rate(optimisation, step_idx)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.num_steps_done += 1
        return StepResult(self.num_steps_done, loss, balance, l1, zeros, rate, penalty, norm)

    def _backward(self, tokens: torch.Tensor, penalty: float, num_parts: int) -> tuple[float, float, float, float]:
        """Add the gradients of one micro-batch; return its loss, balance, L1 norm and share of zeros."""
        hidden = HiddenSums(keeps_norms=penalty > 0)
        with autocast(self._device, self._optimisation.dtype):
            result = forward(self.config, self.weights, tokens[:, :-1], hidden)
        loss = functional.cross_entropy(result.logits.flatten(0, 1), tokens[:, 1:].flatten())
        total = loss
        balance = l1 = 0.0
        if result.routings:
            balancing = load_balancing_loss(result.routings, self.config.num_experts)
            total = total + self._optimisation.balance * balancing
            balance = float(balancing.detach())
        norm = hidden.mean_norm
        if norm is not None:
            total = total + penalty * norm
            l1 = float(norm.detach())
        (total / num_parts).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach()), balance, l1, hidden.zero_share


def make_optimiser(weights: Mapping[str, torch.nn.Parameter], optimisation: Optimisation) -> torch.optim.AdamW:
    """AdamW in float32; matrices decay, norms do not."""
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    vectors = [weight for weight in weights.values() if weight.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optimisation.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=optimisation.learning_rate,
        betas=(optimisation.beta1, optimisation.beta2),
        eps=1e-8,
        fused=True,
    )


@contextlib.contextmanager
def autocast(device: torch.device, dtype: str) -> Iterator[None]:
    """Matrix products in bf16 over float32 weights, or nothing at all."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16"):
        yield
