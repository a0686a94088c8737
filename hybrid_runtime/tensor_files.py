"""Safetensors files of our own: written whole or not at all, and read only when they are what was expected."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hybrid_runtime.errors import BudgetError, CheckpointError
from hybrid_runtime.whole_files import TEMPORARY, sync_folder

ABANDONED = ".tmp??????"  # as the library names what it writes before it renames it
Expected = Mapping[str, tuple[tuple[int | None, ...], torch.dtype]]
"""Name to shape and dtype; None stands for any size."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all. Raise BudgetError when it cannot be written.

    One writer a folder at a time: what a kill left there of an earlier one is removed.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        remove_abandoned(path.parent)
        save_file(dict(tensors), temporary, dict(metadata) or None)
        temporary.chmod(0o644)  # safetensors leaves it readable for its owner alone
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise BudgetError(
            f"{path}: could not be written: {error}; what was saved before is untouched; make room and run again"
        ) from error


def remove_abandoned(folder: Path) -> None:
    """Away with the files that safetensors began under names of its own, and a kill left."""
    for path in folder.glob(ABANDONED):
        path.unlink(missing_ok=True)


def read_tensors(path: Path, expected: Expected, remedy: str) -> dict[str, torch.Tensor]:
    """The expected tensors, in memory. Raise CheckpointError for a file that has others, ending in the remedy."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                different = ", ".join(sorted(names ^ set(expected))[:3])
                raise CheckpointError(f"{path}: lacks or adds {different}; {remedy}")
            for name, (shape, _) in expected.items():  # before anything is read: sizes may be absurd
                _check_shape(f"{path}: {name}", tuple(file.get_slice(name).get_shape()), shape, remedy)
            tensors = {name: file.get_tensor(name).clone() for name in expected}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; {remedy}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; {remedy}") from error
    for name, (_, dtype) in expected.items():
        if tensors[name].dtype != dtype:
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}, expected {dtype}; {remedy}")
    return tensors


def read_metadata(path: Path, remedy: str) -> dict[str, str]:
    """The strings in the file's header. Raise CheckpointError for what is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}; {remedy}") from error


def _check_shape(what: str, found: tuple[int, ...], expected: tuple[int | None, ...], remedy: str) -> None:
    fits = len(found) == len(expected) and all(
        wanted in (None, size) for size, wanted in zip(found, expected, strict=True)
    )
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise CheckpointError(f"{what} has shape {found}, expected ({sizes}); {remedy}")
