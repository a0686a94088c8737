"""What a run will take of the machine's memory, worked out before anything is loaded.

`--ram` is a promise about the peak of the whole process. What cannot keep it is refused with the table of what the
model needs and the flag that would make it fit; so is, without --ram, what the machine cannot hold at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError
from hybrid_runtime.model.kv_cache import KvDtype, kv_cache_bytes
from hybrid_runtime.sizes import format_bytes

PREFILL_BATCH = 256  # tokens
KERNEL_BLOCK_BYTES = 48 << 20  # blocks that the CPU kernels dequantise into, with their temporaries
# What Numba and LLVM take to compile the kernels, and keep. Measured: 30 MiB from Numba's cache, 110 MiB without it.
COMPILER_BYTES = 112 << 20
LOADED_KERNELS_BYTES = 50 << 20  # what linking them takes where they were compiled before, measured
EXPECTED_BLOCK_BYTES = 20 << 20  # of KERNEL_BLOCK_BYTES and the allocator's share, what runs were seen to take
CONVERSION_BLOCK_BYTES = 128 << 20  # blocks of 16 MiB in several stages, beside one whole down projection
CONVERSION_RESIDUE_BYTES = 64 << 20  # of those, what the allocator has not given back when the model is loaded
ADVICE_SLACK_BYTES = 8 << 20  # the program's own part differs from run to run, and the advice should hold in the next
ALLOCATOR_SHARE = 0.02  # what the allocator keeps beyond what was asked for, seen on this runtime's runs


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """What decides how much a run takes, beside the model's shape.

    scores: logits of every token are computed, not only of the last. largest_converted_bytes: of the tensors that a
    conversion holds whole, as float32; 0 where the store is there already.
    """

    weights_bytes: int
    num_positions: int
    kv_dtype: KvDtype
    scores: bool = False
    largest_converted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by what takes them. program: Python, torch and what else is loaded already, measured.

    conversion: peak while the store is made, which is over before the weights are read.
    """

    program: int
    weights: int
    kv_cache: int
    workspace: int
    compiler: int
    conversion: int

    @property
    def total(self) -> int:
        """The expected peak of the process."""
        return int(self._asked_for * (1 + ALLOCATOR_SHARE))

    @property
    def expected(self) -> int:
        """What a run will rather take, kernels compiled before and nothing converted; `total` is what is promised."""
        workspace = self.workspace - KERNEL_BLOCK_BYTES + EXPECTED_BLOCK_BYTES
        return self.program + LOADED_KERNELS_BYTES + self.weights + self.kv_cache + workspace

    def room_in(self, ram_bytes: int) -> int:
        """Bytes of weights that could come on top, `total` staying within ram_bytes; below 0 where it is above."""
        return int(ram_bytes / (1 + ALLOCATOR_SHARE)) - self._asked_for

    @property
    def _asked_for(self) -> int:
        lasting = self.program + self.compiler
        residue = min(self.conversion, CONVERSION_RESIDUE_BYTES)
        return lasting + max(self.weights + self.kv_cache + self.workspace + residue, self.conversion)

    def describe(self) -> str:
        """The table on one line."""
        parts = {
            "program": self.program,
            "weights": self.weights,
            "KV cache": self.kv_cache,
            "workspace": self.workspace,
            "compiled kernels": self.compiler,
        }
        table = " + ".join(f"{format_bytes(size)} {name}" for name, size in parts.items())
        return f"{table}; {format_bytes(self.conversion)} while converting" if self.conversion else table


def plan_memory(config: ModelConfig, needs: MemoryNeeds, program_bytes: int) -> MemoryPlan:
    """Expected peak of a process that holds program_bytes before it loads anything."""
    converts = needs.largest_converted_bytes > 0
    return MemoryPlan(
        program=program_bytes,
        weights=needs.weights_bytes,
        kv_cache=kv_cache_bytes(config, needs.num_positions, needs.kv_dtype),
        workspace=workspace_bytes(config, needs.num_positions, scores=needs.scores),
        compiler=COMPILER_BYTES,
        conversion=CONVERSION_BLOCK_BYTES + 2 * needs.largest_converted_bytes if converts else 0,
    )


def workspace_bytes(config: ModelConfig, num_positions: int, *, scores: bool = False) -> int:
    """The largest set of temporaries that one step of the forward pass holds at once."""
    batch = min(PREFILL_BATCH, num_positions)
    queries = min(128, batch)
    stream = 8 * batch * config.hidden_size * 4
    attention = 3 * config.num_attention_heads * queries * num_positions * 4
    keys_and_values = 2 * num_positions * config.num_key_value_heads * config.head_dim * 4
    feed_forward = 2 * batch * config.intermediate_size * 4
    logits = (3 * batch if scores else 4) * config.vocab_size * 4  # scored: logits, their logarithms, one temporary
    return stream + max(attention + keys_and_values, feed_forward) + logits + KERNEL_BLOCK_BYTES


def require_memory(
    plan: MemoryPlan, ram_bytes: int | None, available_bytes: int, least: MemoryPlan | None = None
) -> None:
    """Raise BudgetError when the plan's peak is above --ram, or above what the machine can give.

    available_bytes: free for this process now, beside what it already holds (plan.program). least: the same run with
    its neurons on disk, where it may leave them there.
    """
    on_disk = ""
    if least is not None and least.total < plan.total:
        on_disk = f" ({_mebibytes_above(least.total + ADVICE_SLACK_BYTES)}M with neurons on disk)"
    if ram_bytes is not None and plan.total > ram_bytes:
        raise BudgetError(
            f"--ram {format_bytes(ram_bytes)}: the model needs {format_bytes(plan.total)} ({plan.describe()}); "
            f"give at least --ram {_mebibytes_above(plan.total + ADVICE_SLACK_BYTES)}M{on_disk}, "
            "a smaller --ctx, or a smaller --quant"
        )
    if plan.total - plan.program > available_bytes:
        raise BudgetError(
            f"the model needs {format_bytes(plan.total)} ({plan.describe()}), the machine has "
            f"{format_bytes(available_bytes)} free{on_disk}; close other programs, or use a smaller --ctx or --quant"
        )


def _mebibytes_above(num_bytes: int) -> int:
    return -(-num_bytes // (1 << 20))
