"""Cosines and sines of positions on the GPU, kept for as long as sequences are rotated by the same frequencies."""

from __future__ import annotations

import torch

from hybrid_runtime.model.decoder import Rotation as Frequencies

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, float32 [positions, D / 2], magnitude included."""


class RotationTables:
    """On one device. longrope has two sets of frequencies, by how long the sequence is; others have one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: list[tuple[torch.Tensor, Rotation]] = []

    def of(self, rotation: Frequencies | None, num_positions: int) -> Rotation | None:
        """Of at least that many positions; the same tensors for the same frequencies. None: the model has none."""
        if rotation is None:
            return None
        frequencies, magnitude = rotation
        for known, tables in self._tables:
            if len(tables[0]) >= num_positions and torch.equal(known, frequencies):
                return tables
        angles = torch.arange(num_positions).float().unsqueeze(1) * frequencies
        tables = (magnitude * angles.cos()).to(self._device), (magnitude * angles.sin()).to(self._device)
        self._tables.append((frequencies, tables))
        return tables
