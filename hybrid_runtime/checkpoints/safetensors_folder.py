"""A Hugging Face model folder: one `model.safetensors`, or shards that an index names.

The index and the shards must agree in both directions, so that a half-finished download, a shard left over from another
revision or an index of another model is named here and not found as a wrong answer later. Shard names are plain file
names: an index cannot make the loader open files elsewhere. Symbolic links are followed, because the Hugging Face cache
is made of them. `metadata.total_size` of an index is not compared: exporters have counted tied tensors twice, counted
parameters instead of bytes and written floats, so a mismatch says nothing about the shards, while the sizes that matter
are checked against each shard's own length. Pickles (`*.bin`, `*.pt`) are never opened: loading one can run code.
Mistral's `consolidated*.safetensors`, published beside the shards with other tensor names, are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from hybrid_runtime.checkpoints.file_reading import open_file
from hybrid_runtime.checkpoints.safetensors_file import read_safetensors_header
from hybrid_runtime.checkpoints.tensor_file import TensorInfo
from hybrid_runtime.errors import CheckpointError
from hybrid_runtime.strict_json import parse_json_object, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_INDEX_BYTES = 100_000_000
MAX_LISTED = 5


def open_safetensors_folder(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the model in `folder`, whichever of its files holds it."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed: {error.strerror}; name the model's folder") from error
    shards = sorted(name for name in names if fnmatchcase(name, SHARD_PATTERN))
    if INDEX_FILE in names:
        weight_map = _read_weight_map(folder / INDEX_FILE)
        _check_files(folder, names, shards, set(weight_map.values()))
        return _open_shards(folder, weight_map)
    if shards:
        raise CheckpointError(
            f"{folder}: has {_listed(shards)} but no {INDEX_FILE}, which tells whether all are there; fetch it"
        )
    if SINGLE_FILE in names:
        return read_safetensors_header(folder / SINGLE_FILE)
    raise CheckpointError(_nothing_to_load(folder, names))


def _read_weight_map(path: Path) -> dict[str, str]:
    """The shard that the index gives for each tensor."""
    with open_file(path) as file:
        if file.num_bytes > MAX_INDEX_BYTES:
            raise CheckpointError(
                f"{path}: has {file.num_bytes} bytes, expected at most {MAX_INDEX_BYTES}; not an index"
            )
        index = parse_json_object(file.read(0, file.num_bytes), str(path))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing, empty or no object; fetch the index again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_file_name(shard):
            raise CheckpointError(
                f"{path}: weight_map {shown(tensor)} is {shown(shard)}, expected the name of a .safetensors "
                "file in the same folder; the index is damaged or made to mislead"
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    forbidden = any(character in "/\\:" or not character.isprintable() for character in name)
    return name.endswith(".safetensors") and not name.startswith(".") and not forbidden and len(name) <= 255


def _check_files(folder: Path, names: set[str], shards: list[str], indexed: set[str]) -> None:
    missing = sorted(indexed - names)
    if missing:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names {_listed(missing)}, not found; finish the download")
    extra = [name for name in shards if name not in indexed]
    if extra:
        raise CheckpointError(
            f"{folder}: {_listed(extra)} not named by {INDEX_FILE}; remove leftovers or fetch the index again"
        )
    if SINGLE_FILE in names and SINGLE_FILE not in indexed:
        raise CheckpointError(
            f"{folder}: has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it; remove the one that is stale"
        )


def _open_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        for name, info in read_safetensors_header(folder / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {shown(name)} is in {tensors[name].path.name} and in {shard}, expected in one; "
                    "the shards are of different revisions: fetch them again"
                )
            tensors[name] = info
    _check_agreement(folder, tensors, weight_map)
    return tensors


def _check_agreement(folder: Path, tensors: dict[str, TensorInfo], weight_map: dict[str, str]) -> None:
    for name, shard in weight_map.items():
        info = tensors.get(name)
        if info is None or info.path.name != shard:
            found = "in no shard" if info is None else f"in {info.path.name}"
            raise CheckpointError(
                f"{folder}: tensor {shown(name)} is {found}, {INDEX_FILE} says {shard}; fetch index and shards again"
            )
    for name, info in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{folder}: tensor {shown(name)} of {info.path.name} is not in {INDEX_FILE}; "
                "fetch index and shards again"
            )


def _nothing_to_load(folder: Path, names: set[str]) -> str:
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    if pickles:
        return (
            f"{folder}: has only pickles ({_listed(pickles)}), which are never loaded because they can run code; "
            "fetch or make a safetensors version"
        )
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if others:
        return f"{folder}: has {_listed(others)} but no {SINGLE_FILE} and no {INDEX_FILE}; fetch the Hugging Face files"
    return f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}; name a model's folder or finish the download"


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    rest = f" and {len(every) - MAX_LISTED} more" if len(every) > MAX_LISTED else ""
    return ", ".join(shown(name) for name in every[:MAX_LISTED]) + rest
