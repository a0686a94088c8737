"""What a run is asked for, and whom it talks to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hybrid_kernels.activation import Activation
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_tools.training.documents import TextFile
from hybrid_tools.training.recipe import Optimisation, Shape
from hybrid_tools.training.trainer import StepResult


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the user asked for. activation None: the source's own; source None: a new model of `shape`.

    tokenizer None: the source's, or one trained with vocab_size pieces. round_to: the kind of store on whose levels the
    model's weights shall lie. save_every, test_every: in steps. exports: whether to write the model as of the newest
    checkpoint instead of training on. command: what was typed.
    """

    folder: Path
    files: tuple[TextFile, ...]
    optimisation: Optimisation
    shape: Shape
    activation: Activation | None
    source: Checkpoint | None
    tokenizer: Path | None
    vocab_size: int
    held_out: float
    seed: int
    num_threads: int
    device: str
    save_dtype: str
    round_to: str | None
    save_every: int
    test_every: int
    exports: bool
    command: str


class Display(Protocol):
    """What a run tells about itself."""

    def say(self, message: str) -> None:
        """One line."""

    def step(self, result: StepResult, num_steps: int, tokens_per_s: float) -> None:
        """A step is done."""

    def close(self) -> None:
        """No step follows."""
