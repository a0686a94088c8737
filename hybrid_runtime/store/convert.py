"""Weights into a store, one part at a time, so that a kill at any moment costs at most the part being written.

Order of events, each durable before the next: a journal that marks the folder as unfinished; each part under a
temporary name, synced, renamed, then named in the journal with its digest; the tokenizer; and last the manifest, which
alone makes the folder a store. A rerun keeps the parts in the journal. An older store in the same folder stays the one
that is read until the manifest is replaced, and only then are its files removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, CheckpointError, HybridError, StoreError, UsageError
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.store.layout import Part, Quantization, lay_out
from hybrid_runtime.store.manifest import DATA_PREFIX, FORMAT_VERSION, MANIFEST, Manifest, read_manifest
from hybrid_runtime.store.reader import Store, open_store
from hybrid_runtime.store.weight_source import WeightSource
from hybrid_runtime.whole_files import TEMPORARY, sync_folder, write_whole

JOURNAL = "journal.jsonl"
LOCK = ".lock"
TOKENIZER = "tokenizer"
SPARE_BYTES = 32 << 20  # tokenizer, manifest, journal and the file system's own blocks

SaveTokenizer = Callable[[Path], None]

_DATA_NAME = re.compile(DATA_PREFIX + "[0-9a-f]{16}")
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is converted into what. save_tokenizer writes the tokenizer's files into a folder that it is given."""

    source: WeightSource
    destination: Path
    quantization: Quantization
    model: str
    save_tokenizer: SaveTokenizer

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.source.config

    @property
    def data(self) -> str:
        """Name of the data folder, from the source as it is at this moment."""
        try:
            return data_name(self.source, self.quantization)
        except OSError as error:
            raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}; fetch it again") from error

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files that will be written."""
        return lay_out(self.config, self.quantization, self.source.predictor_ranks())


def data_name(source: WeightSource, quantization: Quantization) -> str:
    """Another source, quantisation or format goes into another data folder, so that they are never mixed."""
    weights = quantization.weights
    key = f"{FORMAT_VERSION}:{source.fingerprint()}:{weights.kind}:{weights.group}"
    return DATA_PREFIX + hashlib.sha256(key.encode()).hexdigest()[:16]


def finished_store(conversion: Conversion) -> Store | None:
    """The store that this conversion would make, where it is there already and whole."""
    return open_store(conversion.destination) if _is_done(conversion) else None


def convert(conversion: Conversion, progress: Progress | None = None, *, waits: bool = False) -> Store:
    """Write the store, resuming what an earlier run finished. Raise before any work when the disk will not hold it.

    waits: whether to wait for another process that is writing the same folder, or to refuse.
    """
    destination = conversion.destination
    try:
        _refuse_foreign_folder(destination)
        if not _is_done(conversion):
            _write_store_alone(conversion, progress or NoProgress(), waits=waits)
    except filelock.Timeout as error:
        raise UsageError(
            f"{destination}: another conversion is writing here; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise _cannot_write(destination, error) from error
    return open_store(destination)


def _write_store_alone(conversion: Conversion, progress: Progress, *, waits: bool) -> None:
    destination = conversion.destination
    if not destination.exists():
        _refuse_small_disk(conversion)  # a refusal leaves not even the folder
        destination.mkdir(parents=True)
    with filelock.FileLock(destination / LOCK, timeout=-1 if waits else 0):
        if not _is_done(conversion):  # another process may have done it since
            _refuse_small_disk(conversion)
            _write_store(conversion, progress)


def _write_store(conversion: Conversion, progress: Progress) -> None:
    data = conversion.destination / conversion.data
    _remove(_leftovers(conversion, data))
    finished = _finished_parts(conversion, data)
    data.mkdir(exist_ok=True)
    (data / JOURNAL).touch()
    sync_folder(data)
    sync_folder(conversion.destination)
    try:
        _write_parts(conversion, data, finished, progress)
        _write_tokenizer(conversion, data)
        _write_manifest(conversion, data, finished)
    except CheckpointError as error:
        # What is finished of a broken checkpoint is of no use; after a failed read it is.
        if not isinstance(error.__cause__, OSError) and data.name != _data_in_use(conversion.destination):
            shutil.rmtree(data, ignore_errors=True)
        raise
    finally:
        _remove(_temporaries(conversion.destination, data))
    _remove(_leftovers(conversion, data))
    (data / JOURNAL).unlink()


def _write_parts(conversion: Conversion, data: Path, finished: dict[str, str], progress: Progress) -> None:
    """Write what is missing and add its digests to finished."""
    missing = [part for part in conversion.parts if part.file not in finished]
    if missing:
        verb = "resuming" if finished else "converting"
        progress.start(f"{verb} {conversion.model}", sum(part.num_bytes for part in missing))
    try:
        for part in missing:
            finished[part.file] = _write_part(conversion.source, data / part.file, part, progress)
            _append_journal(data, part.file, finished[part.file])
    finally:
        progress.done()


def _write_part(source: WeightSource, path: Path, part: Part, progress: Progress) -> str:
    """Write the whole part under a temporary name, then rename it; return its sha256."""
    temporary = path.with_suffix(TEMPORARY)
    digest = hashlib.sha256()
    with temporary.open("wb") as file:
        for payload in _part_bytes(source, part):
            digest.update(payload)
            file.write(payload)
            progress.advance(len(payload))
        file.flush()
        os.fsync(file.fileno())
    found = temporary.stat().st_size
    assert found == part.num_bytes, f"{temporary} has {found} bytes, planned {part.num_bytes}"
    temporary.rename(path)
    sync_folder(path.parent)
    return digest.hexdigest()


def _part_bytes(source: WeightSource, part: Part) -> Iterator[bytes | memoryview]:
    position = 0
    for entry in part.entries:
        yield bytes(entry.offset - position)
        for block in source.blocks(entry):
            yield block.contiguous().view(-1).numpy().data
        position = entry.offset + entry.num_bytes


def _write_tokenizer(conversion: Conversion, data: Path) -> None:
    if _has_tokenizer(conversion, data):
        return
    temporary = data / (TOKENIZER + TEMPORARY)
    temporary.mkdir()
    conversion.save_tokenizer(temporary)
    for path in temporary.iterdir():
        _sync_file(path)
    sync_folder(temporary)
    if (data / TOKENIZER).exists():
        (data / TOKENIZER).rename(data / f"{TOKENIZER}-old{TEMPORARY}")
    temporary.rename(data / TOKENIZER)
    sync_folder(data)


def _write_manifest(conversion: Conversion, data: Path, digests: dict[str, str]) -> None:
    source = conversion.source
    if conversion.data != data.name:
        raise CheckpointError(f"{source.name}: changed while it was converted; convert it again when it is whole")
    manifest = Manifest(
        model=conversion.model,
        config=source.config,
        quantization=conversion.quantization,
        predictor_ranks=source.predictor_ranks(),
        data=data.name,
        sha256={part.file: digests[part.file] for part in conversion.parts},
        source=source.fingerprint(),
    )
    write_whole(conversion.destination / MANIFEST, manifest.to_json().encode())


def _is_done(conversion: Conversion) -> bool:
    """Whether the store in the folder is already this conversion's result, and nothing else is there."""
    try:
        store = open_store(conversion.destination)
    except StoreError:
        return False
    data = store.data_folder
    if data.name != conversion.data or (data / JOURNAL).exists():
        return False
    return not any(_leftovers(conversion, data)) and _has_tokenizer(conversion, data)


def _has_tokenizer(conversion: Conversion, data: Path) -> bool:
    """Whether the tokenizer that the source has now, which the data folder's name says nothing of, is there."""
    folder = data / TOKENIZER
    if not folder.is_dir():
        return False
    with tempfile.TemporaryDirectory() as current:
        conversion.save_tokenizer(Path(current))
        return _contents(Path(current)) == _contents(folder)


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _finished_parts(conversion: Conversion, data: Path) -> dict[str, str]:
    """Digests of the parts that are in the data folder whole: the manifest or the journal names them."""
    digests = _read_journal(data)
    if data.name == _data_in_use(conversion.destination):
        digests = read_manifest(conversion.destination).sha256 | digests
    sizes = {part.file: part.num_bytes for part in conversion.parts}
    paths = {file: data / file for file in digests if file in sizes}
    return {
        file: digests[file] for file, path in paths.items() if path.is_file() and path.stat().st_size == sizes[file]
    }


def _read_journal(data: Path) -> dict[str, str]:
    """Digests by file; a torn last line is a part that was not finished."""
    digests: dict[str, str] = {}
    journal = data / JOURNAL
    for line in journal.read_text(errors="replace").splitlines() if journal.is_file() else ():
        try:
            entry = json.loads(line)
            digests[str(entry["file"])] = str(entry["sha256"])
        except (ValueError, KeyError, TypeError):
            continue
    return digests


def _append_journal(data: Path, file: str, digest: str) -> None:
    with (data / JOURNAL).open("a") as journal:
        journal.write("\n" + json.dumps({"file": file, "sha256": digest}) + "\n")  # a torn line above stays its own
        journal.flush()
        os.fsync(journal.fileno())


def _leftovers(conversion: Conversion, data: Path) -> Iterator[Path]:
    """Temporaries, and data folders that neither the manifest names nor this conversion writes."""
    destination = conversion.destination
    yield from _temporaries(destination, data)
    in_use = _data_in_use(destination)
    if in_use is None and (destination / MANIFEST).exists():
        return  # another version's store: not ours to remove
    for folder in destination.glob(f"{DATA_PREFIX}*"):
        if _DATA_NAME.fullmatch(folder.name) and folder.name not in (data.name, in_use):
            yield folder


def _temporaries(destination: Path, data: Path) -> Iterator[Path]:
    yield from data.glob("*" + TEMPORARY)
    yield from destination.glob(MANIFEST + TEMPORARY)


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _data_in_use(destination: Path) -> str | None:
    """Name of the data folder of the store that is in the folder, if there is one."""
    try:
        return read_manifest(destination).data
    except StoreError:
        return None


def _refuse_foreign_folder(destination: Path) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise UsageError(f"{destination}: is a file; name a folder for the store")
    names = {path.name for path in destination.iterdir()}
    is_ours = names <= {LOCK, MANIFEST, MANIFEST + TEMPORARY} or any(_DATA_NAME.fullmatch(name) for name in names)
    if not is_ours:
        raise UsageError(f"{destination}: is neither empty nor a store; choose another folder")


def _refuse_small_disk(conversion: Conversion) -> None:
    """Compare what is missing with what is free or will be, before anything is written or removed."""
    data = conversion.destination / conversion.data
    finished = _finished_parts(conversion, data)
    missing_bytes = sum(part.num_bytes for part in conversion.parts if part.file not in finished)
    if not missing_bytes:
        return
    folder = next(path for path in (data, *data.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free + sum(_num_bytes(path) for path in _leftovers(conversion, data))
    if missing_bytes + SPARE_BYTES > free:
        raise BudgetError(
            f"{conversion.destination}: the store needs {format_bytes(missing_bytes + SPARE_BYTES)} more, the disk has "
            f"{format_bytes(free)} free; free some, choose a folder on another disk, or a smaller --quant"
        )


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def _cannot_write(destination: Path, error: OSError) -> HybridError:
    what = f"{error.filename or destination}: cannot be written: {error.strerror or error}"
    if error.errno in DISK_IS_FULL:
        return BudgetError(f"{what}; free some disk and run it again, it goes on where it was")
    return UsageError(f"{what}; choose another folder")


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
