"""The kernels there are, and the name of one compiled for a row format."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.row_codes import FORMATS

SOURCES = {
    "run_program": "hybrid_kernels.native.program_loop:run_program",
    "work_until_closed": "hybrid_kernels.native.program_loop:work_until_closed",
    "read_memory": "hybrid_kernels.bandwidth.cpu:read_memory",
    "begin_token": "hybrid_kernels.rope.cpu:begin_token",
    "attend": "hybrid_kernels.attention.cpu_token:attend",
    "route": "hybrid_kernels.routing.cpu:route",
    "sum_shares": "hybrid_kernels.sparse_ffn.cpu_sum:sum_shares",
    "project": "hybrid_kernels.linear.cpu:project",
    "run_neurons": "hybrid_kernels.sparse_ffn.cpu:run_neurons",
    "split_neurons": "hybrid_kernels.tiers.cpu:split_neurons",
    "run_down": "hybrid_kernels.tiers.cpu_down_rows:run_down",
    "quantize_batch": "hybrid_kernels.linear.cpu_batch:quantize_batch",
    "multiply_batch": "hybrid_kernels.linear.cpu_batch:multiply_batch",
    "multiply_down": "hybrid_kernels.linear.cpu_down:multiply_down",
    "unpack_matrix": "hybrid_kernels.linear.cpu_batch:unpack_matrix",
}
"""Module and function of each."""

FORMATTED = frozenset(
    {
        "begin_token",
        "project",
        "run_neurons",
        "run_down",
        "quantize_batch",
        "multiply_batch",
        "multiply_down",
        "unpack_matrix",
    }
)
"""Those that read packed rows: each is compiled for one format, which keeps them small."""

SLOW_TO_COMPILE = frozenset({"run_neurons", "multiply_down", "multiply_batch"})


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """A kernel, compiled for rows of one format where it reads any. format_idx: in FORMATS; -1: none."""

    name: str
    format_idx: int = -1

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be compiled."""
        if self.name not in SOURCES:
            raise ValueError(f"kernel {self.name!r} is not one of {', '.join(SOURCES)}")
        if (self.format_idx >= 0) != (self.name in FORMATTED) or self.format_idx >= len(FORMATS):
            raise ValueError(f"kernel {self.name} with row format number {self.format_idx}")

    def __str__(self) -> str:
        """Such as project-q4-32: unique, and a file's name."""
        if self.format_idx < 0:
            return self.name
        row_format = FORMATS[self.format_idx]
        return f"{self.name}-{row_format.kind}" + (f"-{row_format.group}" if row_format.group else "")


def kernel(name: str, row_format: RowFormat | None = None) -> Kernel:
    """A kernel for rows of that format."""
    return Kernel(name, -1 if row_format is None else FORMATS.index(row_format))
