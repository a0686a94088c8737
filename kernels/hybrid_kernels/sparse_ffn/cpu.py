"""The sparse feed-forward network, compiled: reads no bundle that is not active, and of those only rows it needs.

Bound by the bytes of the active bundles. A gate that does not fire spares its up and down rows, an up value that makes
the neuron zero spares its down row. Active neurons are cut into a fixed number of shares, each with an output of its
own, which are summed in order: results do not depend on the number of threads. A batch of tokens goes through torch in
blocks of neurons instead, since together its tokens activate most of them.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from hybrid_kernels.activation import ACTIVATION_KINDS, Activation, activate, gate_fires
from hybrid_kernels.compiled import compiled
from hybrid_kernels.linear.cpu import linear, padded_vectors, unpack_rows
from hybrid_kernels.linear.op import SMALLEST_COMPILED
from hybrid_kernels.packed_matrix import Bundles
from hybrid_kernels.row_simd import format_code, num_groups, row_axpy4, row_dot, vector_columns
from hybrid_kernels.sparse_ffn import reference

MOST_TOKENS = 8  # above, tokens share enough neurons for a batch over blocks of them
NUM_SHARES = 16  # more than threads, so that others catch up with a slow one
BLOCK_WEIGHTS = 1 << 22  # of each part of a bundle: 16 MiB of float32
WORTHWHILE_SHARE = 0.7  # above this share of active neurons, gathering costs more than the rows it saves


def sparse_ffn(
    x: torch.Tensor,
    bundles: Bundles,
    activation: Activation,
    active: torch.Tensor | None = None,
    *,
    gate_first: bool = False,
) -> torch.Tensor:
    """x: [T, H] float32; active: [T, I] bool, or None for every neuron -> [T, H] float32."""
    is_small = bundles.num_neurons * bundles.hidden_size < SMALLEST_COMPILED
    if len(x) <= MOST_TOKENS and not is_small:
        output = _token_by_token(x, bundles, activation, active)  # stops at gates whether or not it is asked to
    else:
        if gate_first and activation.gate_decides:
            fires = gate_fires(activation, linear(x, bundles.gate_proj, bundles.gate_bias))  # [T, I]
            active = fires if active is None else active & fires
        output = _over_blocks(x, bundles, activation, active)
    return output if bundles.down_bias is None else output + bundles.down_bias


def _over_blocks(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None
) -> torch.Tensor:
    """Sum the contributions of the neurons that any token activates, a block at a time in ascending order."""
    union = None
    if active is not None:
        neurons = active.any(dim=0).nonzero().squeeze(1)  # [N], sorted
        union = neurons if len(neurons) < WORTHWHILE_SHARE * bundles.num_neurons else None
    output = torch.zeros_like(x)
    step = max(1, BLOCK_WEIGHTS // bundles.hidden_size)
    for start in range(0, bundles.num_neurons if union is None else len(union), step):
        block = slice(start, start + step) if union is None else union[start : start + step]
        output += _block(x, bundles.take(block), activation, None if active is None else active[:, block])
    return output


def _block(x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None) -> torch.Tensor:
    """x: [T, H]; a block of neurons [B]; active: [T, B] -> [T, H], the block's share of the output."""
    if bundles.num_neurons * bundles.hidden_size < SMALLEST_COMPILED:
        return reference.sparse_ffn(x, bundles, activation, active)
    gate = linear(x, bundles.gate_proj, bundles.gate_bias) if bundles.has_gate else None  # [T, B]
    hidden = activate(activation, gate, linear(x, bundles.up_proj, bundles.up_bias))
    if active is not None:
        hidden = hidden * active
    down = bundles.down_proj_t
    weights = torch.empty(bundles.num_neurons, vector_columns(down.row_format, down.columns))
    unpack_rows(down, weights)
    return hidden @ weights[:, : down.columns]


def _token_by_token(
    x: torch.Tensor, bundles: Bundles, activation: Activation, active: torch.Tensor | None
) -> torch.Tensor:
    """x: [T, H] -> [T, H] without the output's bias."""
    row_format = bundles.row_format
    vectors = padded_vectors(x, bundles.up_proj)  # [T, vector_columns]
    everyone = torch.arange(bundles.num_neurons)
    shares = np.empty((NUM_SHARES, vectors.shape[1]), dtype=np.float32)
    output = torch.empty_like(x)
    for token in range(len(x)):
        neurons = everyone if active is None else active[token].nonzero().squeeze(1)
        _ffn_kernel(
            format_code(row_format),
            ACTIVATION_KINDS.index(activation.kind),
            activation.threshold,
            bundles.data.data_ptr(),
            bundles.data.stride(0),
            bundles.data.stride(1),
            row_format.value_bytes(bundles.hidden_size),
            num_groups(row_format, bundles.hidden_size),
            _array(bundles.gate_bias),
            _array(bundles.up_bias),
            bundles.has_gate,
            neurons.numpy(),
            vectors[token].numpy(),
            shares,
        )
        output[token] = torch.from_numpy(shares).sum(dim=0)[: bundles.hidden_size]
    return output


def _array(bias: torch.Tensor | None) -> np.ndarray:
    return np.empty(0, dtype=np.float32) if bias is None else bias.numpy()


@compiled(parallel=True)
def _ffn_kernel(
    code: int,
    kind: int,
    threshold: float,
    data: int,
    bundle_stride: int,
    row_stride: int,
    value_bytes: int,
    groups: int,
    gate_bias: np.ndarray,
    up_bias: np.ndarray,
    has_gate: bool,
    neurons: np.ndarray,
    x: np.ndarray,
    shares: np.ndarray,
) -> None:
    """neurons: int64 [N]; x: float32 [vector_columns]; shares: float32 [NUM_SHARES, vector_columns], overwritten."""
    num_shares = shares.shape[0]
    for share in numba.prange(num_shares):
        y = shares[share]
        y[:] = 0.0
        rows, factors = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.float32)
        waiting = 0  # down rows are added four at a time, because y is read and written once a pass
        for idx in range(len(neurons) * share // num_shares, len(neurons) * (share + 1) // num_shares):
            neuron = neurons[idx]
            row = data + neuron * bundle_stride
            gate = 0.0
            if has_gate:
                gate = row_dot(code, row, row + value_bytes, x.ctypes.data, groups)
                if len(gate_bias):
                    gate += gate_bias[neuron]
                if _is_silenced(kind, threshold, gate):
                    continue
                row += row_stride
            up = row_dot(code, row, row + value_bytes, x.ctypes.data, groups)
            if len(up_bias):
                up += up_bias[neuron]
            hidden = _activate(kind, gate, up)
            if hidden == 0.0:
                continue
            rows[waiting], factors[waiting] = row + row_stride, hidden
            waiting += 1
            if waiting == 4:
                _add_rows(code, rows, factors, y, groups, value_bytes)
                waiting = 0
        if waiting:
            factors[waiting:] = 0.0
            rows[waiting:] = rows[0]
            _add_rows(code, rows, factors, y, groups, value_bytes)


@numba.njit
def _add_rows(code: int, rows: np.ndarray, factors: np.ndarray, y: np.ndarray, groups: int, value_bytes: int) -> None:
    row_axpy4(
        code,
        rows[0],
        rows[1],
        rows[2],
        rows[3],
        factors[0],
        factors[1],
        factors[2],
        factors[3],
        y.ctypes.data,
        groups,
        value_bytes,
    )


_SILU, _GELU, _GELU_TANH, _RELU_GLU, _DRELU, _FATRELU, _RELU2_GLU, _RELU, _RELU2, _PLAIN_GELU, _PLAIN_SILU = range(11)
assert ACTIVATION_KINDS[_SILU] == "silu_glu"
assert ACTIVATION_KINDS[_PLAIN_SILU] == "silu"


@numba.njit(inline="always")
def _is_silenced(kind: int, threshold: float, gate: float) -> bool:
    """Whether the gate alone makes the neuron zero."""
    return _RELU_GLU <= kind <= _RELU2_GLU and not gate > threshold


@numba.njit
def _activate(kind: int, gate: float, up: float) -> float:
    """The neuron's value, for a gate that is not silenced."""
    if kind == _SILU:
        return gate / (1.0 + math.exp(-gate)) * up
    if kind == _GELU:
        return float(_gelu(gate) * up)
    if kind == _GELU_TANH:
        return float(_gelu_tanh(gate) * up)
    if kind in (_RELU_GLU, _FATRELU):
        return gate * up
    if kind == _DRELU:
        return gate * max(up, 0.0)
    if kind == _RELU2_GLU:
        return gate * gate * up
    if kind == _RELU:
        return max(up, 0.0)
    if kind == _RELU2:
        return max(up, 0.0) ** 2
    if kind == _PLAIN_GELU:
        return float(_gelu(up))
    return up / (1.0 + math.exp(-up))


@numba.njit
def _gelu(value: float) -> float:
    return 0.5 * value * (1.0 + math.erf(value * math.sqrt(0.5)))


@numba.njit
def _gelu_tanh(value: float) -> float:
    return 0.5 * value * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (value + 0.044715 * value**3)))
