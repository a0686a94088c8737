"""A store opened for reading: its parts as tensors, sizes checked before anything is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_kernels.packed_matrix import Bundles, PackedMatrix
from hybrid_runtime.errors import StoreError
from hybrid_runtime.store.layout import Entry, Part
from hybrid_runtime.store.manifest import Manifest, read_manifest
from hybrid_runtime.store.memory import LoadMode, anonymous_block, mapped_block
from hybrid_runtime.store.parallel_read import READ_THREADS, Filling, belongs_in_page_cache, fill

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

    def read_parts(
        self, parts: Sequence[Part], load: LoadMode = "anonymous", num_threads: int = READ_THREADS
    ) -> list[dict[str, Weight]]:
        """Each part's weights by canonical name, as views of one block of memory a part.

        num_threads: readers that fill anonymous memory. Raises StoreError for a part that is no longer whole.
        """
        paths = [self.data_folder / part.file for part in parts]
        if load == "mmap":
            blocks = [mapped_block(path, part.num_bytes) for path, part in zip(paths, parts, strict=True)]
        else:
            blocks = [anonymous_block(part.num_bytes) for part in parts]
            past_cache = not belongs_in_page_cache(self.num_bytes)
            fill(list(map(Filling, paths, blocks)), past_cache=past_cache, num_threads=num_threads)
        return [
            {
                entry.name: view_entry(block[entry.offset : entry.offset + entry.num_bytes], entry)
                for entry in part.entries
            }
            for part, block in zip(parts, blocks, strict=True)
        ]

    def read_part(self, part: Part) -> Iterator[tuple[str, Weight]]:
        """One part's weights by canonical name."""
        (weights,) = self.read_parts([part])
        yield from weights.items()

    def weight(self, name: str) -> Weight:
        """One weight by canonical name, mapped; KeyError for one that the model has not."""
        part = next((part for part in self.manifest.parts if any(entry.name == name for entry in part.entries)), None)
        if part is None:
            raise KeyError(name)
        return self.read_parts([part], "mmap")[0][name]

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


def view_entry(data: torch.Tensor, entry: Entry) -> Weight:
    """An entry's bytes, uint8 [num_bytes], as the weight that they are."""
    if entry.kind == "vector":
        return data.view(torch.float32)
    columns = entry.shape[-1]
    row_bytes = entry.row_format.row_bytes(columns)
    if entry.kind == "rows":
        return PackedMatrix(data.view(entry.shape[0], row_bytes), columns, entry.row_format)
    return Bundles(data.view(*entry.shape[:-1], row_bytes), columns, entry.row_format)
