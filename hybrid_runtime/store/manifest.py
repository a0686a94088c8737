"""store.json: the one file that makes a folder a store. Read strictly: a field too many is another version's."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import CheckpointError, IncompleteStore, StoreError
from hybrid_runtime.store.layout import Part, Quantization, lay_out
from hybrid_runtime.strict_json import parse_json_object

FORMAT_NAME = "hybrid-runtime store"
FORMAT_VERSION = 2
MANIFEST = "store.json"
DATA_PREFIX = "data-"
LARGEST_MANIFEST_BYTES = 64 << 20
OUTER_PARTS = 2  # embed.bin and head.bin, beside one part a layer

_KEYS = frozenset({"format", "version", "model", "config", "quant", "group", "ranks", "data", "sha256", "source"})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a store holds. data: name of the folder beside store.json; sha256: hex digest of each part's file.

    source: fingerprint of the checkpoint that it was converted from.
    """

    model: str
    config: ModelConfig
    quantization: Quantization
    predictor_ranks: dict[str, int]
    data: str
    sha256: dict[str, str]
    source: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """The files and what lies where in them: a function of the configuration, so it is not stored."""
        return lay_out(self.config, self.quantization, self.predictor_ranks)

    def to_json(self) -> str:
        """The text of store.json."""
        weights = self.quantization.weights
        values = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "model": self.model,
            "config": self.config.to_json(),
            "quant": weights.kind,
            "group": weights.group,
            "ranks": self.predictor_ranks,
            "data": self.data,
            "sha256": self.sha256,
            "source": self.source,
        }
        return json.dumps(values, indent=1) + "\n"


def is_store(folder: Path) -> bool:
    """Whether the folder is a store, finished or not."""
    return (folder / MANIFEST).is_file() or (folder.is_dir() and any(folder.glob(f"{DATA_PREFIX}*/journal.jsonl")))


def read_manifest(folder: Path) -> Manifest:
    """Raise IncompleteStore or StoreError, naming the file, the field and what to do."""
    path = folder / MANIFEST
    if not path.is_file():
        if is_store(folder):
            raise IncompleteStore(
                f"{folder}: its conversion has not finished; run the same hybrid-convert command again to resume it "
                "(hybrid-synth, if that began it)"
            )
        raise StoreError(f"{folder}: has no {MANIFEST}; it is not a store")
    if path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise StoreError(f"{path}: is {path.stat().st_size} bytes, expected at most {LARGEST_MANIFEST_BYTES}")
    try:
        return _checked(parse_json_object(path.read_bytes(), str(path), StoreError), path)
    except (CheckpointError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: {error}; convert the model again") from error


def _checked(values: dict[str, object], path: Path) -> Manifest:
    if values.get("format") != FORMAT_NAME:
        raise StoreError(f"{path}: format is {values.get('format')!r}, expected {FORMAT_NAME!r}")
    version = values.get("version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StoreError(f"{path}: format version {version!r}, this program reads {FORMAT_VERSION}; convert it again")
    if set(values) != _KEYS:
        raise StoreError(f"{path}: fields {sorted(set(values) ^ _KEYS)} do not belong to version {FORMAT_VERSION}")
    ranks, digests, data = values["ranks"], values["sha256"], values["data"]
    if not isinstance(ranks, dict) or not all(type(rank) is int and 0 < rank < 1 << 24 for rank in ranks.values()):
        raise StoreError(f"{path}: ranks are not whole numbers above 0")
    if not isinstance(digests, dict) or not all(re.fullmatch(r"[0-9a-f]{64}", str(each)) for each in digests.values()):
        raise StoreError(f"{path}: sha256 does not hold digests")
    if not isinstance(data, str) or not re.fullmatch(DATA_PREFIX + r"[0-9a-f]{16}", data):
        raise StoreError(f"{path}: data is {data!r}, expected {DATA_PREFIX}<16 hex digits>")
    quant, group = values["quant"], values["group"]
    config = ModelConfig.from_json(values["config"])
    if len(digests) != config.num_hidden_layers + OUTER_PARTS:  # before a part is laid out for each layer
        raise StoreError(
            f"{path}: sha256 names {len(digests)} parts, num_hidden_layers {config.num_hidden_layers} "
            f"means {config.num_hidden_layers + OUTER_PARTS}; convert the model again"
        )
    manifest = Manifest(
        model=str(values["model"]),
        config=config,
        quantization=Quantization(RowFormat(quant, group)),  # type: ignore[arg-type]  # RowFormat checks itself
        predictor_ranks=ranks,
        data=data,
        sha256=digests,
        source=str(values["source"]),
    )
    if {part.file for part in manifest.parts} != set(digests):
        raise StoreError(f"{path}: sha256 names other files than the parts; convert the model again")
    return manifest
