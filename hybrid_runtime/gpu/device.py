"""What decoding asks of a GPU beside kernels: memory that it can copy from, to be told when it is so far, replays.

Everything goes through the current stream, in order. On a machine without a GPU the same code runs on the CPU's memory
in Triton's interpreter, where whatever is launched is done at once: that is how tests run it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybrid_runtime.garbage import without_collections
from hybrid_runtime.sizes import format_bytes

COMPILER_BYTES = 512 << 20  # Triton's and LLVM's; assumed, for want of a GPU to measure it with
Work = Callable[[], None]
Pool = Any  # torch has no public type for it


@dataclass(slots=True)
class GpuDevice:
    """torch_device: a CUDA device, or the CPU for the interpreter. replays: whether work is recorded as CUDA graphs."""

    torch_device: torch.device
    replays: bool = True
    _aside: torch.cuda.Stream | None = field(default=None, init=False)

    @property
    def is_cuda(self) -> bool:
        """Whether it is one."""
        return self.torch_device.type == "cuda"

    def available_bytes(self, wanted: int, say: Callable[[str], None]) -> int:
        """What of that many bytes the GPU can give, to this process, now. A line where another one has the rest."""
        if not self.is_cuda:
            return wanted
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        if free >= wanted:
            return wanted
        say(f"the GPU has {format_bytes(free)} free of {format_bytes(wanted)} asked for: planning with these")
        return int(free)

    @property
    def host_bytes(self) -> int:
        """Of RAM, what compiling kernels for it takes."""
        return COMPILER_BYTES if self.is_cuda else 0

    def peak_bytes(self) -> int:
        """Most that this process has held of the GPU's memory, without what CUDA takes for itself."""
        return torch.cuda.max_memory_reserved(self.torch_device) if self.is_cuda else 0

    @property
    def way(self) -> str:
        """How work gets there, in a word for those who look."""
        return ("CUDA graphs" if self.replays else "eager") if self.is_cuda else "interpreted"

    def host_memory(self, num_items: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros [num_items] in RAM that the GPU copies from and to by itself."""
        return torch.zeros(num_items, dtype=dtype, pin_memory=self.is_cuda)

    def host_zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray:
        """The same as an array of any shape."""
        memory = self.host_memory(math.prod(shape) * np.dtype(dtype).itemsize, torch.uint8)
        return memory.numpy().view(dtype).reshape(shape)

    def mark(self) -> torch.cuda.Event | None:
        """A point in the stream: everything that was launched so far."""
        if not self.is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Until all before the mark is done. Lets go of the GIL."""
        if mark is not None:
            mark.synchronize()

    def new_pool(self) -> Pool:
        """Memory for pieces of work that are recorded one after the other. It is gone with the last of them, and takes
        what torch keeps for other work now, while it still may.
        """
        torch.cuda.empty_cache()
        return torch.cuda.graph_pool_handle()

    def recorded(self, work: Work, pool: Pool) -> Work:
        """The work's launches as one, without doing them: memory that it uses must stay where it is.

        Not by torch.cuda.graph, which collects garbage each time: a token has some sixty pieces of work. While one is
        recorded nothing is collected: a graph that nobody needs must not end then. All go through one stream, by which
        torch tells memory apart.
        """
        if self._aside is None:
            self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph, current, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), self._aside
        aside.wait_stream(current)
        with without_collections(), torch.cuda.stream(aside):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # what went wrong is told by the first error
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(aside)
        replay: Work = graph.replay
        return replay
