"""A store opened for reading: parts as tensors in anonymous memory, sizes checked before anything is allocated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_runtime.errors import StoreError
from hybrid_runtime.store.layout import Entry, Part
from hybrid_runtime.store.manifest import Manifest, read_manifest

Weight = torch.Tensor | PackedMatrix | Bundles
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Store:
    """A complete store; every part has been seen to have its size."""

    folder: Path
    manifest: Manifest

    @property
    def data_folder(self) -> Path:
        """Where the parts and the tokenizer lie."""
        return self.folder / self.manifest.data

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer and the chat template lie; may be absent."""
        return self.data_folder / "tokenizer"

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts, which is what the weights take in memory."""
        return sum(part.num_bytes for part in self.manifest.parts)

    def read_part(self, part: Part) -> Iterator[tuple[str, Weight]]:
        """The part's weights by canonical name, as views of one block of anonymous memory."""
        path = self.data_folder / part.file
        block = torch.empty(part.num_bytes, dtype=torch.uint8)
        with path.open("rb", buffering=0) as file:
            view = block.numpy().data.cast("B")
            filled = 0
            while filled < part.num_bytes:
                count = file.readinto(view[filled:])
                if not count:
                    raise StoreError(
                        f"{path}: ends at byte {filled}, expected {part.num_bytes}; convert the model again"
                    )
                filled += count
        for entry in part.entries:
            yield entry.name, _view(block, entry)

    def verify(self) -> None:
        """Read everything and raise StoreError for the first part whose digest is not the manifest's."""
        for part in self.manifest.parts:
            path = self.data_folder / part.file
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != self.manifest.sha256.get(part.file):
                raise StoreError(
                    f"{path}: its sha256 is not the manifest's; the file is damaged: convert the model again"
                )


def open_store(folder: Path) -> Store:
    """Raise IncompleteStore or StoreError before any weight is read."""
    store = Store(folder, read_manifest(folder))
    for part in store.manifest.parts:
        path = store.data_folder / part.file
        found = path.stat().st_size if path.is_file() else None
        if found != part.num_bytes:
            what = "is missing" if found is None else f"has {found} bytes, expected {part.num_bytes}"
            raise StoreError(f"{path}: {what}; convert the model again")
    return store


def _view(block: torch.Tensor, entry: Entry) -> Weight:
    data = block[entry.offset : entry.offset + entry.num_bytes]
    if entry.kind == "vector":
        return data.view(torch.float32)
    columns = entry.shape[-1]
    row_bytes = entry.row_format.row_bytes(columns)
    if entry.kind == "rows":
        return PackedMatrix(data.view(entry.shape[0], row_bytes), columns, entry.row_format)
    return Bundles(data.view(*entry.shape[:-1], row_bytes), columns, entry.row_format)
