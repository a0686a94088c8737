"""Preparing and running the batch kernels: what op.py dispatches to for packed rows and many vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hybrid_kernels.linear import batch_layout as layout
from hybrid_kernels.native.arguments import Word, words
from hybrid_kernels.native.instruction_sets import instruction_set
from hybrid_kernels.native.kernel_names import Kernel, kernel
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import format_code, num_groups, vector_columns
from hybrid_kernels.team import Operation, Team

UNPACK_WEIGHTS = 1 << 22  # 16 MiB of float32 at once: torch multiplies smaller blocks slowly
HIDDEN = RowFormat("q8", layout.BLOCK)
"""How the neurons' values are quantised for a down projection: 32 neurons share a scale."""


@dataclass(frozen=True, slots=True)
class QuantizedBatch:
    """Vectors as int8 for rows of one format. levels: [T, V]; scales: [T, groups]; starts: [T, V / 32]."""

    levels: np.ndarray
    scales: np.ndarray
    starts: np.ndarray
    row_format: RowFormat
    columns: int


def quantize_batch(x: torch.Tensor, row_format: RowFormat, team: Team) -> QuantizedBatch:
    """x: float32 [T, K], rows contiguous -> what rows of that format are multiplied with."""
    count, columns = x.shape
    width, groups = vector_columns(row_format, columns), num_groups(row_format, columns)
    batch = QuantizedBatch(
        np.empty((count, width), dtype=np.int8),
        np.empty((count, groups), dtype=np.float32),
        np.empty((count, width // layout.BLOCK), dtype=np.int32),
        row_format,
        columns,
    )
    stride = layout.quantize_scratch(width)
    scratch = np.empty(stride * team.num_threads, dtype=np.uint8)
    x = x if x.stride(1) == 1 else x.contiguous()
    values: dict[int, Word] = {
        layout.Q_X: x,
        layout.Q_STRIDE: 4 * x.stride(0),
        layout.Q_COUNT: count,
        layout.Q_COLUMNS: columns,
        layout.Q_CODE: format_code(row_format),
        layout.Q_GROUPS: groups,
        layout.Q_VECTOR_COLUMNS: width,
        layout.Q_SHORTS: int(instruction_set() == "avx2"),
        layout.Q_LEVELS: batch.levels,
        layout.Q_SCALES: batch.scales,
        layout.Q_STARTS: batch.starts,
        layout.Q_SCRATCH: scratch,
        layout.Q_SCRATCH_STRIDE: stride,
    }
    _run(team, kernel("quantize_batch", row_format), words(layout.Q_WORDS, values))
    return batch


def multiply(batch: QuantizedBatch, weight: PackedMatrix, team: Team, index: np.ndarray | None = None) -> torch.Tensor:
    """Vectors times rows -> float32 [T, N]. index: int32 [N], which rows; None: all in order."""
    num_rows = weight.num_rows if index is None else len(index)
    output = torch.empty(len(batch.levels), num_rows)
    stride = layout.multiply_scratch(batch.levels.shape[1])
    _multiply(kernel("multiply_batch", weight.row_format), batch, weight, index, output, stride, team)
    return output


def multiply_down(
    hidden: torch.Tensor, rows: PackedMatrix, team: Team, index: np.ndarray | None = None
) -> torch.Tensor:
    """hidden: float32 [T, N], the neurons' values; rows: [I, H], of which index names N (None: all) -> [T, H]."""
    batch = quantize_batch(hidden, HIDDEN, team)
    output = torch.empty(len(hidden), rows.columns)
    _multiply(kernel("multiply_down", rows.row_format), batch, rows, index, output, layout.down_scratch(), team)
    return output


def unpack(weight: PackedMatrix, output: torch.Tensor, team: Team) -> None:
    """Write the weights of N rows to output: float32 [N, vector_columns], contiguous."""
    row_format = weight.row_format
    values: dict[int, Word] = {
        layout.UNPACK_CODE: format_code(row_format),
        layout.UNPACK_ROWS: weight.rows,
        layout.UNPACK_STRIDE: weight.rows.stride(0),
        layout.UNPACK_VALUE_BYTES: row_format.value_bytes(weight.columns),
        layout.UNPACK_GROUPS: num_groups(row_format, weight.columns),
        layout.UNPACK_COUNT: weight.num_rows,
        layout.UNPACK_OUTPUT: output,
        layout.UNPACK_OUTPUT_STRIDE: 4 * output.stride(0),
    }
    _run(team, kernel("unpack_matrix", row_format), words(layout.UNPACK_WORDS, values))


def multiply_unpacked(x: torch.Tensor, weight: PackedMatrix, team: Team) -> torch.Tensor:
    """Vectors times rows without scales (bf16), in float32, a block of rows at a time."""
    output = torch.empty(len(x), weight.num_rows)
    width = vector_columns(weight.row_format, weight.columns)
    step = max(1, UNPACK_WEIGHTS // width)
    scratch = torch.empty(min(step, weight.num_rows), width)
    for start in range(0, weight.num_rows, step):
        stop = min(start + step, weight.num_rows)
        block = scratch[: stop - start]
        unpack(weight.slice_rows(start, stop), block, team)
        torch.mm(x, block[:, : weight.columns].T, out=output[:, start:stop])
    return output


def _multiply(
    wanted: Kernel,
    batch: QuantizedBatch,
    weight: PackedMatrix,
    index: np.ndarray | None,
    output: torch.Tensor,
    scratch_stride: int,
    team: Team,
) -> None:
    count, width = batch.levels.shape
    scratch = np.empty(scratch_stride * team.num_threads, dtype=np.uint8)
    values: dict[int, Word] = {
        layout.LEVELS: batch.levels,
        layout.SCALES: batch.scales,
        layout.STARTS: batch.starts,
        layout.COUNT: count,
        layout.VECTOR_COLUMNS: width,
        layout.GROUPS: batch.scales.shape[1],
        layout.CODE: format_code(weight.row_format),
        layout.ROWS: weight.rows,
        layout.STRIDE: weight.rows.stride(0),
        layout.NUM_ROWS: weight.num_rows if index is None else len(index),
        layout.INDEX: index,
        layout.VALUE_BYTES: weight.row_format.value_bytes(weight.columns),
        layout.OUTPUT: output,
        layout.OUTPUT_STRIDE: 4 * output.stride(0),
        layout.COLUMNS: weight.columns,
        layout.SCRATCH: scratch,
        layout.SCRATCH_STRIDE: scratch_stride,
    }
    if count and values[layout.NUM_ROWS]:
        _run(team, wanted, words(layout.NUM_WORDS, values))
    else:
        output.zero_()


def _run(team: Team, wanted: Kernel, arguments: np.ndarray) -> None:
    team.run(team.program([Operation(wanted, wanted.name, arguments)]))
