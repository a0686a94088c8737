"""Saving a run's state so that a kill at any moment costs the steps since the last one, and nothing else.

One safetensors file a checkpoint: the weights in float32 and AdamW's two moments by canonical name, and the step. It is
written under a temporary name, synced and renamed, and only then is the one before the last removed: a disk that fills
leaves the older ones as they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.tensor_files import write_tensors
from hybrid_runtime.whole_files import TEMPORARY

KEPT = 2
_REMEDY = "remove it, and the same command goes on from the one before"
MOMENTS = ("exp_avg", "exp_avg_sq")
_FILE = re.compile(r"step-(\d{8})\.safetensors")


@dataclass(frozen=True, slots=True)
class State:
    """num_steps: that are done; weights and moments (exp_avg, exp_avg_sq) by canonical name, float32."""

    num_steps: int
    weights: Mapping[str, torch.Tensor]
    moments: Mapping[str, Mapping[str, torch.Tensor]]


def save_state(folder: Path, state: State) -> Path:
    """Write, then forget all but the newest KEPT. Raise BudgetError when the disk does not hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f"*{TEMPORARY}"):  # a kill left it
        abandoned.unlink()
    path = folder / f"step-{state.num_steps:08d}.safetensors"
    tensors = {f"weights/{name}": tensor.detach() for name, tensor in state.weights.items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": tensor for name, tensor in state.moments[moment].items()}
    write_tensors(path, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {})
    for _, old in list_states(folder)[:-KEPT]:
        old.unlink()
    return path


def load_state(path: Path, expected: Mapping[str, torch.Tensor] | None = None) -> State:
    """What save_state wrote, in memory. Raise CheckpointError for a file that is broken.

    expected: the model's weights; a state of other names or shapes is refused too.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, MOMENTS[0]: {}, MOMENTS[1]: {}}
    match = _FILE.fullmatch(path.name)
    assert match is not None
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dict
                part, _, tensor = name.partition("/")
                parts[part][tensor] = file.get_tensor(name).clone()
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: is no checkpoint of hybrid-train: {error}; {_REMEDY}") from error
    if expected is not None:
        for part, tensors in parts.items():
            _refuse_other_tensors(f"{path}: {part}", tensors, expected)
    return State(int(match[1]), parts["weights"], {moment: parts[moment] for moment in MOMENTS})


def _refuse_other_tensors(where: str, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        shapes = [tuple(each[name].shape) if name in each else "nothing" for each in (found, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(f"{where}/{name}: found {shapes[0]}, expected {shapes[1]}; {_REMEDY}")


def list_states(folder: Path) -> list[tuple[int, Path]]:
    """(steps done, file) of every whole checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)
