"""One compiled kernel at a time, called as a token's program calls it: arguments in words, addresses of arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_kernels.activation_kinds import ACTIVATION_KINDS
from hybrid_kernels.attention import layout as attention_words
from hybrid_kernels.linear import layout as linear_words
from hybrid_kernels.native import input_layout as input_words
from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.packed_order import packed_columns
from hybrid_kernels.row_codes import format_code, num_groups, vector_columns
from hybrid_kernels.sparse_ffn import layout as ffn_words
from hybrid_kernels.team import Operation

NEURONS_PER_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's kind of input_layout, its weight, bias and eps."""

    kind: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    eps: float = 1e-5


def run(team, *operations):
    team.run(team.program(operations))


def nan_bytes(num_bytes):
    """Memory that shows when it is read before it was written: 0xff bytes are NaN in every float."""
    return np.full(num_bytes, 255, dtype=np.uint8)


def nan_floats(*shape):
    return np.full(shape, np.nan, dtype=np.float32)


def vector_values(team, x, row_format, columns, norm=None):
    """The words of a kernel's input, and the scratch that must outlive the call."""
    stride = input_words.scratch_bytes(-(-columns // 128) * 128)
    scratch = nan_bytes(stride * team.num_threads)
    return scratch, {
        input_words.X: x,
        input_words.NORM_KIND: input_words.NO_NORM if norm is None else norm.kind,
        input_words.NORM_WEIGHT: None if norm is None else norm.weight,
        input_words.NORM_BIAS: None if norm is None else norm.bias,
        input_words.EPS: 0.0 if norm is None else float(norm.eps),
        input_words.COLUMNS: columns,
        input_words.VECTOR_COLUMNS: vector_columns(row_format, columns),
        input_words.CODE: format_code(row_format),
        input_words.GROUPS: num_groups(row_format, columns),
        input_words.VALUE_BYTES: row_format.value_bytes(columns),
        input_words.SCRATCH: scratch,
        input_words.SCRATCH_STRIDE: stride,
    }


def project_operation(team, x, matrices, outputs, seconds, *, columns, barrier=True, **options):
    """`project` of matrices (bias None or a tensor beside each); returns the operation and what it keeps alive."""
    row_format = matrices[0][0].row_format
    scratch, values = vector_values(team, x, row_format, columns, options.get("norm"))
    table = np.zeros((len(matrices), linear_words.MATRIX_WORDS), dtype=np.int64)
    for row, (weight, bias) in zip(table, matrices, strict=True):
        row[:] = words(
            linear_words.MATRIX_WORDS,
            {
                linear_words.ROWS: weight.rows,
                linear_words.STRIDE: weight.rows.stride(0),
                linear_words.NUM_ROWS: weight.num_rows,
                linear_words.BIAS: bias,
                linear_words.MATRIX_COLUMNS: weight.columns,
                linear_words.MATRIX_VECTOR_COLUMNS: vector_columns(row_format, weight.columns),
                linear_words.MATRIX_GROUPS: num_groups(row_format, weight.columns),
                linear_words.MATRIX_VALUE_BYTES: row_format.value_bytes(weight.columns),
            },
        )
    targets = np.zeros((len(outputs), linear_words.OUTPUT_WORDS), dtype=np.int64)
    for row, output, second in zip(targets, outputs, seconds, strict=True):
        row[:] = words(linear_words.OUTPUT_WORDS, {linear_words.OUTPUT: output, linear_words.RESIDUAL: second})
    values |= {
        input_words.INPUT_STRIDE: options.get("input_stride", 0),
        linear_words.NUM_MATRICES: len(outputs),
        linear_words.MATRICES: table,
        linear_words.CHOSEN: options.get("chosen"),
        linear_words.OUTPUTS: targets,
        linear_words.OUTPUT_KIND: options.get("kind", linear_words.STORE),
        linear_words.THRESHOLD: float(options.get("threshold", 0.0)),
        linear_words.ROWS_PER_TASK: options.get("rows_per_task", 5),
        linear_words.NUM_STATIC: options.get("num_static", 0),
    }
    arguments = words(linear_words.NUM_WORDS, values)
    kept = (scratch, table, targets, x, outputs, seconds, matrices, options)
    return Operation(kernel("project", row_format), "project", arguments, barrier), kept


def project(team, x, weight, bias=None, *, residual=None, **options):
    """x: [K] float32 -> [N] float32: one matrix, as decoding multiplies it."""
    output = nan_floats(weight.num_rows)
    operation, kept = project_operation(
        team, x, [(weight, bias)], [output], [residual], columns=weight.columns, **options
    )
    run(team, operation)
    del kept
    return torch.from_numpy(output)


def select(team, x, weight, threshold, rows_per_task=NEURONS_PER_BLOCK, num_static=0):
    """x: [K] -> the selected rows' numbers, task by task as they lie in memory."""
    num_tasks = -(-weight.num_rows // rows_per_task)
    chosen, counts = np.full(weight.num_rows, -1, dtype=np.int32), np.full(num_tasks, -1, dtype=np.int64)
    options = {"kind": linear_words.SELECT, "threshold": threshold, "rows_per_task": rows_per_task}
    options |= {"num_static": num_static}
    operation, kept = project_operation(
        team, x, [(weight, None)], [chosen], [counts], columns=weight.columns, **options
    )
    run(team, operation)
    del kept
    return [chosen[idx * rows_per_task :][:count].tolist() for idx, count in enumerate(counts)]


def decode_ffn(team, x, networks, activation, *, active=None, chosen=None, weights=None, num_shares=3, residual=None):
    """x: [H]; active: bool [slots, I] -> [H] and the rows read, [gate, up, down]: run_neurons, then sum_shares."""
    bundles = networks[0]
    row_format, hidden, num_neurons = bundles.row_format, bundles.hidden_size, bundles.num_neurons
    slots = 1 if chosen is None else len(chosen)
    width = vector_columns(row_format, hidden)
    chosen = None if chosen is None else np.array(chosen, dtype=np.int64)
    weights = None if weights is None else np.array(weights, dtype=np.float32)
    table = np.zeros((len(networks), ffn_words.BUNDLE_WORDS), dtype=np.int64)
    for row, network in zip(table, networks, strict=True):
        row[:] = words(
            ffn_words.BUNDLE_WORDS,
            {
                ffn_words.DATA: network.data,
                ffn_words.BUNDLE_STRIDE: network.data.stride(0),
                ffn_words.ROW_STRIDE: network.data.stride(1),
                ffn_words.GATE_BIAS: network.gate_bias,
                ffn_words.UP_BIAS: network.up_bias,
            },
        )
    selected, counts = _as_blocks(active, slots, num_neurons)
    shares = nan_floats(slots, num_shares, width)
    read_rows = np.zeros((team.num_threads, 8), dtype=np.int64)
    list_size = ffn_words.most_listed(num_neurons, num_shares)
    lists = np.full((team.num_threads + 1, 2, list_size), -1, dtype=np.int32)  # the last is nobody's
    scratch, values = vector_values(team, x, row_format, hidden)
    values |= {
        ffn_words.NUM_SLOTS: slots,
        ffn_words.BUNDLES: table,
        ffn_words.CHOSEN: chosen,
        ffn_words.NUM_NEURONS: num_neurons,
        ffn_words.HAS_GATE: int(activation.is_gated),
        ffn_words.ACTIVATION: ACTIVATION_KINDS.index(activation.kind),
        ffn_words.THRESHOLD: float(activation.threshold),
        ffn_words.SELECTED: None if active is None else selected,
        ffn_words.COUNTS: counts,
        ffn_words.BLOCK: NEURONS_PER_BLOCK,
        ffn_words.NUM_SHARES: num_shares,
        ffn_words.SHARES: shares,
        ffn_words.SLOT_SHARES: num_shares,
        ffn_words.READ_ROWS: read_rows,
        ffn_words.LISTS: lists,
        ffn_words.LIST_SIZE: lists.shape[2],
    }
    order = np.array(packed_columns(row_format) if row_format.is_quantized else [0], dtype=np.int32)
    biases = np.array([0 if n.down_bias is None else n.down_bias.data_ptr() for n in networks], dtype=np.int64)
    residual = torch.zeros(hidden) if residual is None else residual
    output, stride = nan_floats(hidden), input_words.scratch_bytes(-(-hidden // 128) * 128)
    sums = {
        ffn_words.SUM_X: residual,
        ffn_words.SUM_OUTPUT: output,
        ffn_words.SUM_SHARES: shares,
        ffn_words.SUM_NUM_SLOTS: slots,
        ffn_words.SUM_NUM_SHARES: num_shares,
        ffn_words.SUM_COLUMNS: hidden,
        ffn_words.SUM_VECTOR_COLUMNS: width,
        ffn_words.SUM_GROUP: len(order),
        ffn_words.SUM_ORDER: order,
        ffn_words.SUM_WEIGHTS: weights,
        ffn_words.SUM_CHOSEN: chosen,
        ffn_words.SUM_BIASES: biases if biases.any() else None,
        ffn_words.SUM_SCRATCH: scratch,
        ffn_words.SUM_SCRATCH_STRIDE: stride,
    }
    run(
        team,
        Operation(kernel("run_neurons", row_format), "neurons", words(ffn_words.NUM_WORDS, values)),
        Operation(kernel("sum_shares"), "sum", words(ffn_words.SUM_WORDS, sums)),
    )
    assert (lists[-1] == -1).all()
    return torch.from_numpy(output), read_rows.sum(axis=0)[:3].tolist()


def _as_blocks(active, slots, num_neurons):
    """Selected neurons as `select` leaves them: in blocks, with gaps between."""
    num_blocks = -(-num_neurons // NEURONS_PER_BLOCK)
    selected = np.full((slots, num_neurons), -1, dtype=np.int32)
    counts = np.zeros((slots, num_blocks), dtype=np.int64)
    if active is not None:
        for slot in range(slots):
            for block in range(num_blocks):
                start = block * NEURONS_PER_BLOCK
                found = active[slot, start : start + NEURONS_PER_BLOCK].nonzero().squeeze(1) + start
                selected[slot, start : start + len(found)] = found.numpy()
                counts[slot, block] = len(found)
    return selected, counts


def attend(team, query, keys, values, caches, position, *, kind, stride, value_bytes=0, window=None, rotation=None):
    """query: [heads, D]; keys, values: [kv_heads, D] of the new token, appended to the caches -> [heads, D]."""
    heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    token, output = np.array([0, position], dtype=np.int64), nan_floats(heads, head_dim)
    scratch_stride = attention_words.scratch_bytes(heads, kv_heads, head_dim, position + 1)
    scratch = nan_bytes(scratch_stride * team.num_threads)
    cosines, sines = (None, None) if rotation is None else rotation
    arguments = {
        attention_words.TOKEN: token,
        attention_words.QUERY: query,
        attention_words.NEW_KEYS: keys,
        attention_words.NEW_VALUES: values,
        attention_words.OUTPUT: output,
        attention_words.NUM_HEADS: heads,
        attention_words.NUM_KV_HEADS: kv_heads,
        attention_words.HEAD_DIM: head_dim,
        attention_words.ROTATES: int(rotation is not None),
        attention_words.COSINES: cosines,
        attention_words.SINES: sines,
        attention_words.KEY_CACHE: caches[0],
        attention_words.VALUE_CACHE: caches[1],
        attention_words.POSITION_STRIDE: stride,
        attention_words.KV_KIND: kind,
        attention_words.KV_VALUE_BYTES: value_bytes,
        attention_words.WINDOW: window or 0,
        attention_words.SCALE: 1 / math.sqrt(head_dim),
        attention_words.SCRATCH: scratch,
        attention_words.SCRATCH_STRIDE: scratch_stride,
    }
    run(team, Operation(kernel("attend"), "attend", words(attention_words.NUM_WORDS, arguments)))
    return torch.from_numpy(output)
