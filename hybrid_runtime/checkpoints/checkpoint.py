"""A published model as the rest of the runtime sees it: a ModelConfig, and weights by canonical name, read piecewise.

What differs between safetensors and GGUF (names, row orders, stacked experts, a down projection stored transposed) ends
here. Nothing is held in memory but descriptions; `read` fetches rows from the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hybrid_runtime.checkpoints.element_types import ELEMENT_TYPES
from hybrid_runtime.checkpoints.tensor_file import TensorInfo, read_raw_rows, read_rows
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.model.weight_specs import WeightSpec, all_weights

MOST_NAMES_SHOWN = 5
UNWEIGHTY_DTYPES = frozenset(ELEMENT_TYPES) - {"F32", "F16", "BF16", "F64"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """tensors: canonical name -> where it lies; interleaved_heads: projections whose rows pair neighbouring columns.

    down_is_transposed: the checkpoint stores down_proj as [I, H] (PowerInfer). gguf_metadata: where the tokenizer is
    when there are no tokenizer files.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    interleaved_heads: Mapping[str, int] = field(default_factory=dict)
    down_is_transposed: bool = False
    gguf_metadata: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        """Raise CheckpointError for weights that are missing, unknown, or of another shape than config says."""
        config = self.config
        if config.num_hidden_layers * max(1, config.num_experts) > len(self.tensors):  # before each is looped over
            raise CheckpointError(
                f"{self.path}: {len(self.tensors)} tensors cannot be {config.num_hidden_layers} layers"
                + (f" of {config.num_experts} experts" if config.num_experts else "")
                + "; the config and the weights are of different models"
            )
        expected = {spec.name: self._stored_shape(spec) for spec in all_weights(self.config)}
        _refuse_names(self.path, "lacks", expected.keys() - self.tensors.keys())
        _refuse_names(self.path, "has unknown", self.tensors.keys() - expected.keys())
        for name, shape in expected.items():
            found = self.tensors[name].shape
            if len(found) != len(shape) or any(
                want not in (None, have) for want, have in zip(shape, found, strict=True)
            ):
                wanted = tuple("rank" if size is None else size for size in shape)
                info = self.tensors[name]
                raise CheckpointError(
                    f"{info.path}: tensor {info.name} has shape {list(found)}, config says {list(wanted)}; "
                    "the config and the weights are of different models"
                )
            if self.tensors[name].dtype in UNWEIGHTY_DTYPES:
                info = self.tensors[name]
                raise CheckpointError(
                    f"{info.path}: tensor {info.name} is {info.dtype}, expected a float type; a quantised export needs "
                    "its scales: use the unquantised checkpoint"
                )
        for ffn, rank in self.predictor_ranks().items():
            columns = self.tensors[f"{ffn}.predictor.fc2"].shape[1]
            if columns != rank:
                raise CheckpointError(f"{self.path}: {ffn}.predictor.fc2 reads {columns} values, fc1 makes {rank}")

    def _stored_shape(self, spec: WeightSpec) -> tuple[int | None, ...]:
        is_turned = self.down_is_transposed and spec.name.endswith(".down_proj")
        return spec.shape[::-1] if is_turned else spec.shape

    def predictor_ranks(self) -> dict[str, int]:
        """Width of each embedded predictor by its FFN's prefix: real checkpoints differ from layer to layer."""
        suffix = ".predictor.fc1"
        return {
            name.removesuffix(suffix): info.shape[0] for name, info in self.tensors.items() if name.endswith(suffix)
        }

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) in the file's dtype (block-quantised types: float32), finite, in Hugging Face's order."""
        return self._in_order(name, start, self.tensors[name].shape[0] if stop is None else stop, read_rows)

    def read_raw(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as the file's bytes, uint8 [rows, bytes], in Hugging Face's order."""
        return self._in_order(name, start, stop, read_raw_rows)

    def _in_order(
        self, name: str, start: int, stop: int, read: Callable[[TensorInfo, int, int], torch.Tensor]
    ) -> torch.Tensor:
        """Rows [start, stop), of interleaved projections by way of the whole heads that hold them."""
        info = self.tensors[name]
        if name not in self.interleaved_heads:
            return read(info, start, stop)
        head_dim = info.shape[0] // self.interleaved_heads[name]
        first_head, end_head = start // head_dim, -(-stop // head_dim)
        rows = read(info, first_head * head_dim, end_head * head_dim)
        ordered = half_split_rows(rows, end_head - first_head)
        return ordered[start - first_head * head_dim : stop - first_head * head_dim]

    def num_parameters(self) -> int:
        """Weights in the whole checkpoint, predictors included."""
        return sum(_num_elements(info.shape) for info in self.tensors.values())

    def fingerprint(self) -> str:
        """Hex digest over the configuration and every file's name, size and time: a change means another conversion."""
        digest = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for path in sorted({info.path for info in self.tensors.values()}):
            status = path.stat()
            digest.update(f"{path.name}:{status.st_size}:{status.st_mtime_ns};".encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name}:{info.dtype}:{info.shape}:{info.offset};".encode())
        return digest.hexdigest()


def half_split_rows(rows: torch.Tensor, num_heads: int) -> torch.Tensor:
    """rows: [heads * D, ...] whose rotary pairs are neighbours (GGUF's llama) -> pairs half a head apart (ours)."""
    return rows.view(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def expert_slices(info: TensorInfo) -> Iterator[TensorInfo]:
    """The experts of a tensor that stacks them, [E, rows, columns], as E tensors in the same file."""
    num_experts = info.shape[0]
    size = info.num_bytes // num_experts
    for expert_idx in range(num_experts):
        yield TensorInfo(
            f"{info.name}[{expert_idx}]", info.dtype, info.shape[1:], info.path, info.offset + expert_idx * size, size
        )


def _refuse_names(path: Path, verb: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:MOST_NAMES_SHOWN])
        more = f" and {len(names) - MOST_NAMES_SHOWN} more" if len(names) > MOST_NAMES_SHOWN else ""
        raise CheckpointError(
            f"{path}: {verb} tensors {shown}{more}; the checkpoint is not complete or not this family"
        )


def _num_elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
