"""A matrix of packed rows, and the neuron bundles of one feed-forward network: where operations read weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrid_kernels.quantization.row_format import RowFormat


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """rows: uint8 [N, row_bytes], standing for N rows of `columns` weights. The first dimension may be strided, even
    closer than row_bytes: what pads a row may be the next one.
    """

    rows: torch.Tensor
    columns: int
    row_format: RowFormat

    def __post_init__(self) -> None:
        """Raise ValueError when the bytes cannot be such rows."""
        expected = self.row_format.row_bytes(self.columns)
        if self.rows.dtype != torch.uint8 or self.rows.dim() != 2 or self.rows.shape[1] != expected:
            raise ValueError(
                f"rows are {self.rows.dtype} {tuple(self.rows.shape)}, expected uint8 [N, {expected}] "
                f"for {self.columns} columns of {self.row_format}"
            )

    @property
    def num_rows(self) -> int:
        """Number of output features."""
        return self.rows.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes that reading every row reads."""
        return self.num_rows * min(self.rows.stride(0), self.rows.shape[1])

    def close_together(self) -> PackedMatrix:
        """The same rows, copied side by side without padding: narrow ones are mostly that."""
        stride = self.row_format.close_row_bytes(self.columns)
        bytes_after_last = self.rows.shape[1] - stride
        memory = torch.zeros(self.num_rows * stride + bytes_after_last, dtype=torch.uint8)
        memory[: self.num_rows * stride].view(self.num_rows, stride).copy_(self.rows[:, :stride])
        return PackedMatrix(memory.as_strided(tuple(self.rows.shape), (stride, 1)), self.columns, self.row_format)

    def slice_rows(self, start: int, stop: int) -> PackedMatrix:
        """The rows [start, stop), without a copy."""
        return PackedMatrix(self.rows[start:stop], self.columns, self.row_format)


@dataclass(frozen=True, slots=True)
class Bundles:
    """Neurons of one FFN, each with its vectors side by side.

    data: uint8 [I, parts, row_bytes(hidden_size)]; parts are gate row, up row, transposed down row, or only the last
    two where there is no gate. up_bias: float32 [I]; down_bias: float32 [H].
    """

    data: torch.Tensor
    hidden_size: int
    row_format: RowFormat
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Raise ValueError when the bytes cannot be such bundles."""
        expected = self.row_format.row_bytes(self.hidden_size)
        shape = tuple(self.data.shape)
        if self.data.dtype != torch.uint8 or len(shape) != 3 or shape[1] not in (2, 3) or shape[2] != expected:
            raise ValueError(
                f"bundles are {self.data.dtype} {shape}, expected uint8 [I, 2 or 3, {expected}] "
                f"for hidden_size {self.hidden_size} in {self.row_format}"
            )
        widths = {"gate_bias": shape[0], "up_bias": shape[0], "down_bias": self.hidden_size}
        for name, width in widths.items():
            bias = getattr(self, name)
            if bias is not None and tuple(bias.shape) != (width,):
                raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected ({width},)")

    @property
    def num_neurons(self) -> int:
        """Neurons of this FFN (I)."""
        return self.data.shape[0]

    @property
    def has_gate(self) -> bool:
        """Whether the FFN is a gated linear unit."""
        return self.data.shape[1] == 3

    @property
    def gate_proj(self) -> PackedMatrix:
        """[I, H]; only where has_gate."""
        assert self.has_gate
        return PackedMatrix(self.data[:, 0], self.hidden_size, self.row_format)

    @property
    def up_proj(self) -> PackedMatrix:
        """[I, H]."""
        return PackedMatrix(self.data[:, -2], self.hidden_size, self.row_format)

    @property
    def down_proj_t(self) -> PackedMatrix:
        """[I, H]: row i is column i of down_proj."""
        return PackedMatrix(self.data[:, -1], self.hidden_size, self.row_format)

    def take(self, neurons: torch.Tensor | slice) -> Bundles:
        """Some neurons: int64 indices [N] (copied side by side) or a slice (a view), without the bias of the output."""
        return Bundles(
            self.data[neurons],
            self.hidden_size,
            self.row_format,
            gate_bias=None if self.gate_bias is None else self.gate_bias[neurons],
            up_bias=None if self.up_bias is None else self.up_bias[neurons],
        )
