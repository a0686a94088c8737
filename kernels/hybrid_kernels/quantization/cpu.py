"""Quantising to q4 and q8 in Numba; the other kinds are one pass of torch.

q4 is bound by arithmetic (30 roundings a weight): the fit runs over LANES groups at once, a group a lane, so that sums
need no folding across a vector. q8 is bound by memory, and its bytes are the reference's. Levels of q4 may differ from
the reference's where two are equally good, or where a sum in another order tips a rounding; the squared error may not
(the test holds it).
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from hybrid_kernels.compiled import compiled
from hybrid_kernels.quantization.reference import LARGEST_SCALE, Q4_EXTREME_LEVELS, Q4_REFINEMENTS, check_scale
from hybrid_kernels.quantization.row_format import RowFormat

LANES = 64  # a group of 128 times this many lanes is 32 KiB, which the first-level cache still holds
_LEVELS = np.array(Q4_EXTREME_LEVELS, dtype=np.float32)
_LARGEST_SCALE = np.float32(LARGEST_SCALE)


def quantize_rows(weights: torch.Tensor, row_format: RowFormat) -> torch.Tensor:
    """weights: [N, K] float32, float16 or bfloat16, finite; row_format q4 or q8 -> uint8 [N, row_bytes].

    Raises ValueError where a group's scale would not be finite in float16.
    """
    columns = weights.shape[1]
    padding = row_format.padded_columns(columns) - columns
    dense = weights.float().contiguous()
    if padding:  # torch copies even where there is nothing to append
        dense = torch.nn.functional.pad(dense, (0, padding))
    values = dense.numpy()
    scales = np.empty((len(values), values.shape[1] // row_format.group), dtype=np.float32)
    groups = values.reshape(scales.size, row_format.group)
    if row_format.kind == "q4":
        _fit_q4(groups, _LEVELS, Q4_REFINEMENTS, scales.reshape(-1))
    else:
        _fit_q8(groups, scales.reshape(-1))
    check_scale(float(np.abs(scales).max(initial=0.0)))
    half = scales.astype(np.float16)
    rows = np.zeros((len(values), row_format.row_bytes(columns)), dtype=np.uint8)
    write = _write_q4 if row_format.kind == "q4" else _write_q8
    write(values, half.astype(np.float32), row_format.group, rows)
    start = row_format.value_bytes(columns)
    rows[:, start : start + row_format.scale_bytes(columns)] = half.view(np.uint8)
    return torch.from_numpy(rows)


@compiled(parallel=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy")
def _fit_q4(groups: np.ndarray, levels: np.ndarray, refinements: int, scales: np.ndarray) -> None:
    """Write the best scale of every group of groups [M, G] to scales [M]."""
    num_groups, group = groups.shape
    for tile_idx in numba.prange((num_groups + LANES - 1) // LANES):
        first = tile_idx * LANES
        count = min(LANES, num_groups - first)
        tile = np.zeros((group, LANES), np.float32)
        for lane in range(count):
            for column in range(group):
                tile[column, lane] = groups[first + lane, column]
        extreme = _extremes(tile)
        scale, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        projection, energy = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        best_scale, best_gain = np.zeros(LANES, np.float32), np.full(LANES, np.float32(-1.0))
        for level in levels:
            for lane in range(LANES):
                scale[lane] = extreme[lane] / level
            for _ in range(refinements + 1):
                _refine(tile, scale, inverse, projection, energy)
            for lane in range(LANES):
                gain = projection[lane] * scale[lane]  # the squared error is <w, w> - gain
                if gain > best_gain[lane]:
                    best_gain[lane], best_scale[lane] = gain, scale[lane]
        for lane in range(count):
            overflows = abs(extreme[lane]) > np.float32(8.0) * _LARGEST_SCALE  # as in the reference
            scales[first + lane] = extreme[lane] / np.float32(8.0) if overflows else best_scale[lane]


@numba.njit(error_model="numpy", inline="always")
def _extremes(tile: np.ndarray) -> np.ndarray:
    """tile: [G, LANES] -> [LANES], each group's weight of the largest magnitude, the first of equals."""
    extreme = np.zeros(LANES, np.float32)
    for column in range(tile.shape[0]):
        for lane in range(LANES):
            weight = tile[column, lane]
            extreme[lane] = weight if abs(weight) > abs(extreme[lane]) else extreme[lane]
    return extreme


@numba.njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", inline="always")
def _refine(
    tile: np.ndarray, scale: np.ndarray, inverse: np.ndarray, projection: np.ndarray, energy: np.ndarray
) -> None:
    """Round tile's [G, LANES] weights w to levels q, and replace each lane's scale by <w, q> / <q, q>."""
    for lane in range(LANES):
        inverse[lane] = np.float32(1.0) / scale[lane] if scale[lane] != 0.0 else np.float32(0.0)
    projection[:] = 0.0
    energy[:] = 0.0
    for column in range(0, tile.shape[0], 2):  # two, so that the sums are loaded and stored half as often
        for lane in range(LANES):
            first, second = tile[column, lane], tile[column + 1, lane]
            first_level = _nearest(first * inverse[lane], np.float32(-8.0), np.float32(7.0))
            second_level = _nearest(second * inverse[lane], np.float32(-8.0), np.float32(7.0))
            projection[lane] += first * first_level + second * second_level
            energy[lane] += first_level * first_level + second_level * second_level
    for lane in range(LANES):
        scale[lane] = projection[lane] / energy[lane] if energy[lane] > 0.0 else np.float32(0.0)


@compiled(parallel=True, fastmath={"nnan", "nsz", "reassoc"}, error_model="numpy")
def _fit_q8(groups: np.ndarray, scales: np.ndarray) -> None:
    """Write the scale that puts the extreme of every group of groups [M, G] at level 127 to scales [M]."""
    for group_idx in numba.prange(groups.shape[0]):
        extreme = np.float32(0.0)
        for column in range(groups.shape[1]):
            extreme = max(extreme, abs(groups[group_idx, column]))
        scales[group_idx] = extreme / np.float32(127.0)


@compiled(parallel=True, error_model="numpy")
def _write_q4(weights: np.ndarray, scales: np.ndarray, group: int, rows: np.ndarray) -> None:
    """Round weights [N, K] to their group's scale and write the nibbles in row_format's word order."""
    words = group // 8
    for row_idx in numba.prange(weights.shape[0]):
        nibbles = np.empty(group, np.uint8)
        for group_idx in range(scales.shape[1]):
            first, scale = group_idx * group, scales[row_idx, group_idx]
            for column in range(group):
                level = np.float32(0.0)
                if scale != 0.0:
                    level = _nearest(weights[row_idx, first + column] / scale, np.float32(-8.0), np.float32(7.0))
                nibbles[column] = np.uint8(np.int32(level) + 8)
            for word in range(words):
                for byte in range(4):
                    low, high = nibbles[2 * byte * words + word], nibbles[(2 * byte + 1) * words + word]
                    rows[row_idx, first // 2 + word * 4 + byte] = low | (high << 4)


@compiled(parallel=True, error_model="numpy")
def _write_q8(weights: np.ndarray, scales: np.ndarray, group: int, rows: np.ndarray) -> None:
    """Round weights [N, K] to their group's scale and write the levels; rows are zero before."""
    for row_idx in numba.prange(weights.shape[0]):
        for group_idx in range(scales.shape[1]):
            first, scale = group_idx * group, scales[row_idx, group_idx]
            if scale == 0.0:
                continue
            for column in range(first, first + group):
                level = _nearest(weights[row_idx, column] / scale, np.float32(-127.0), np.float32(127.0))
                rows[row_idx, column] = np.uint8(np.int32(level))


@numba.njit(inline="always", error_model="numpy")
def _nearest(value: np.float32, lowest: np.float32, highest: np.float32) -> np.float32:
    return min(max(np.rint(value), lowest), highest)
