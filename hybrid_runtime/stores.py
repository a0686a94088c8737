"""From what a user calls a model to a store on disk: every missing offline step is done here, once, with progress.

A name is a store's folder, a checkpoint's path, an alias or a repository id. Anything that is not a store yet is
converted into the cache, where the next run finds it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid_kernels.quantization.row_format import GROUP_SIZES, ROW_KINDS, RowFormat, RowKind
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.checkpoints.open import open_checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.demo import DEMO_NAME, DEMO_VERSION, make_demo
from hybrid_runtime.errors import CheckpointError, TokenizerError, UsageError
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.shipped import SHIPPED_MODELS
from hybrid_runtime.store.blocks import CheckpointWeights
from hybrid_runtime.store.convert import Conversion, SaveTokenizer, convert, data_name, finished_store
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import is_store
from hybrid_runtime.store.reader import Store, open_store
from hybrid_runtime.store.stored_weights import StoredWeights
from hybrid_runtime.text.load import find_chat_template, load_tokenizer, tokenizer_from_gguf
from hybrid_runtime.text.tokenizer import Tokenizer

DEFAULT_GROUP = 32
QUICK_BYTES = 64 << 20  # converted before anybody looks for a progress line
LARGEST_F32_PARAMETERS = 1 << 28  # 1 GiB: below this, exact weights cost nobody anything
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """What the user asked for. quant None: f32 for a small model, q4 for a large one; group None: 32.

    revision, offline: of a repository's download; ffn_activation: overrides what config.json says.
    """

    name: str
    quant: str | None = None
    group: int | None = None
    ffn_activation: str | None = None
    revision: str | None = None
    offline: bool = False


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on this disk: its store, or the conversion that will make it, of which nothing is done yet."""

    source: Store | Conversion

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.source.manifest.config if isinstance(self.source, Store) else self.source.config

    @property
    def weights(self) -> RowFormat:
        """How the store keeps the weights."""
        source = self.source.manifest if isinstance(self.source, Store) else self.source
        return source.quantization.weights

    @property
    def num_bytes(self) -> int:
        """What the weights take in memory."""
        parts = self.source.manifest.parts if isinstance(self.source, Store) else self.source.parts
        return sum(part.num_bytes for part in parts)

    @property
    def largest_converted_bytes(self) -> int:
        """Of the tensors that a conversion holds whole, as float32; 0 where the store is there."""
        if isinstance(self.source, Store):
            return 0
        return self.source.source.largest_held_bytes

    def open(self, progress: Progress, say: Say) -> Store:
        """The store, converted now where that is not done yet."""
        if isinstance(self.source, Store):
            return self.source
        say(f"converting {self.source.model} to {self.weights} in {self.source.destination}")
        is_quick = self.num_bytes < QUICK_BYTES
        return convert(self.source, NoProgress() if is_quick else progress, waits=True)


def find_model(
    request: ModelRequest, cache_dir: Path, progress: Progress, *, needs_tokenizer: bool = True
) -> FoundModel:
    """Find the model, downloading it where it is a repository; a checkpoint without a tokenizer may be refused."""
    path = _locate(request, cache_dir, progress)
    if path.is_dir() and is_store(path):
        return FoundModel(_open_store(path, request, cache_dir))
    checkpoint, quantization, name = _open_source(path, request)
    folder = cache_dir / "stores" / f"{_safe(name)}-{data_name(CheckpointWeights(checkpoint), quantization)}"
    conversion = plan_conversion(checkpoint, folder, quantization, name, needs_tokenizer=needs_tokenizer)
    return FoundModel(finished_store(conversion) or conversion)


def convert_model(request: ModelRequest, folder: Path, cache_dir: Path, progress: Progress) -> Store:
    """Convert the model into a folder that the caller names."""
    path = _locate(request, cache_dir, progress)
    if path.is_dir() and is_store(path):
        if not _is_shipped(path, request):
            raise UsageError(f"{path}: is a store already; convert the checkpoint that it was made from")
        return convert(_requantization(open_store(path), folder, request), progress)
    checkpoint, quantization, name = _open_source(path, request)
    return convert(plan_conversion(checkpoint, folder, quantization, name), progress)


def _open_source(path: Path, request: ModelRequest) -> tuple[Checkpoint, Quantization, str]:
    """The checkpoint, what it becomes, and the name by which the store will call the model."""
    repo_id = "" if _existing_path(request.name) is not None else request.name
    checkpoint = open_checkpoint(path, repo_id=repo_id, ffn_activation=request.ffn_activation)
    return checkpoint, choose_quantization(request, checkpoint), (repo_id or path.resolve().name).rsplit("/", 1)[-1]


def choose_quantization(request: ModelRequest, checkpoint: Checkpoint) -> Quantization:
    """The asked one; without one, f32 up to LARGEST_F32_PARAMETERS; above, q8 for a file of 8 bits, else q4."""
    return asked_quantization(request.quant or _suitable_kind(checkpoint), request.group)


def asked_quantization(kind: str, group: int | None) -> Quantization:
    """The values of --quant and --group; raise UsageError for a pair that no store is written in."""
    if kind not in ROW_KINDS:
        raise UsageError(f"--quant {kind}: expected one of {', '.join(ROW_KINDS)}")
    if kind not in ("q8", "q4"):
        if group is not None:
            raise UsageError(
                f"--group {group}: {kind} weights share no scales; leave it out, or choose --quant q8 or q4"
            )
        return Quantization(RowFormat(kind))
    if group not in (None, *GROUP_SIZES):
        raise UsageError(f"--group {group}: expected one of {', '.join(map(str, GROUP_SIZES))}")
    return Quantization(RowFormat(kind, group or DEFAULT_GROUP))


def _suitable_kind(checkpoint: Checkpoint) -> RowKind:
    if checkpoint.num_parameters() <= LARGEST_F32_PARAMETERS:
        return "f32"
    matrices = [info.dtype for info in checkpoint.tensors.values() if len(info.shape) > 1]
    return "q8" if matrices.count("Q8_0") > len(matrices) // 2 else "q4"


def plan_conversion(
    checkpoint: Checkpoint,
    destination: Path,
    quantization: Quantization,
    model: str,
    *,
    needs_tokenizer: bool = False,
) -> Conversion:
    """Everything a conversion needs; the tokenizer is read now, so that a broken one is refused before any work."""
    tokenizer, template = _tokenizer_of(checkpoint)
    if tokenizer is None and needs_tokenizer:
        raise TokenizerError(
            f"{checkpoint.path}: comes without a tokenizer, so it cannot read text; expected one of "
            f"{', '.join(TOKENIZER_FILES)} beside config.json"
        )
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, config.json's vocab_size is "
            f"{checkpoint.config.vocab_size}; the two are of different models"
        )

    return Conversion(CheckpointWeights(checkpoint), destination, quantization, model, _saver(tokenizer, template))


def _saver(tokenizer: Tokenizer | None, template: str | None) -> SaveTokenizer:
    def save_tokenizer(folder: Path) -> None:
        if tokenizer is not None:
            tokenizer.save(folder)
        if template is not None:
            (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")

    return save_tokenizer


def load_store_tokenizer(store: Store) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the chat template of a store. Raise TokenizerError when the model came without one."""
    folder = store.tokenizer_folder
    if not folder.is_dir() or not any(path.name != CHAT_TEMPLATE for path in folder.iterdir()):
        raise TokenizerError(f"{store.folder}: the model came without a tokenizer; add its files and convert it again")
    template = folder / CHAT_TEMPLATE
    tokenizer = load_tokenizer(folder, extra_end_ids=store.manifest.config.eos_token_ids)
    return tokenizer, template.read_text(encoding="utf-8") if template.is_file() else None


def _tokenizer_of(checkpoint: Checkpoint) -> tuple[Tokenizer | None, str | None]:
    if checkpoint.gguf_metadata is not None:
        if "tokenizer.ggml.model" not in checkpoint.gguf_metadata:
            return None, None
        template = checkpoint.gguf_metadata.get("tokenizer.chat_template")
        tokenizer = tokenizer_from_gguf(checkpoint.gguf_metadata, file=str(checkpoint.path))
        return tokenizer, template if isinstance(template, str) else None
    if not any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES):
        return None, find_chat_template(checkpoint.path)
    return load_tokenizer(checkpoint.path), find_chat_template(checkpoint.path)


def _locate(request: ModelRequest, cache_dir: Path, progress: Progress) -> Path:
    path = _existing_path(request.name)
    is_demo = path is None and request.name == DEMO_NAME
    shipped = SHIPPED_MODELS.get(request.name) if path is None else None
    if request.revision is not None and (path is not None or is_demo or shipped is not None):
        raise UsageError(f"--revision {request.revision}: {request.name} is not a repository; leave it out")
    if path is not None:
        return path
    if shipped is not None:
        return shipped
    if is_demo:
        return make_demo(cache_dir / f"demo-{DEMO_VERSION}")
    from hybrid_runtime.hub.resolve import resolve_model  # noqa: PLC0415  # huggingface_hub takes 0.3 s to import

    return resolve_model(request.name, revision=request.revision, offline=request.offline, progress=progress)


def _existing_path(name: str) -> Path | None:
    """The path, where there is one; None for what is none, such as a name that no file system can hold."""
    path = os.path.expanduser(name)  # noqa: PTH111  # Path.expanduser raises where there is no such user
    return Path(path) if os.path.exists(path) else None  # noqa: PTH110  # Path.exists raises for 300 characters


def _open_store(path: Path, request: ModelRequest, cache_dir: Path) -> Store | Conversion:
    """The store, where it is as asked; a shipped one in another format becomes another store in the cache."""
    store = open_store(path)
    weights = store.manifest.quantization.weights
    is_as_asked = request.quant in (None, weights.kind) and request.group in (None, weights.group)
    if _is_shipped(path, request) and not is_as_asked:
        conversion = _requantization(store, cache_dir / "stores", request)
        conversion = replace(conversion, destination=conversion.destination / f"{request.name}-{conversion.data}")
        return finished_store(conversion) or conversion
    _refuse_other_format(path, request, weights)
    return store


def _is_shipped(path: Path, request: ModelRequest) -> bool:
    return path == SHIPPED_MODELS.get(request.name)


def _requantization(store: Store, destination: Path, request: ModelRequest) -> Conversion:
    """A store that the package carries, with its weights packed another way."""
    if request.ffn_activation is not None:
        raise UsageError(f"--ffn-activation: {request.name} is a store, its activation was fixed when it was converted")
    weights = store.manifest.quantization.weights
    quantization = asked_quantization(request.quant or weights.kind, request.group)
    tokenizer, template = load_store_tokenizer(store)
    return Conversion(
        StoredWeights(store), destination, quantization, store.manifest.model, _saver(tokenizer, template)
    )


def _refuse_other_format(path: Path, request: ModelRequest, weights: RowFormat) -> None:
    if request.quant is not None and request.quant != weights.kind:
        raise UsageError(f"--quant {request.quant}: {path} is a store in {weights}; convert the original again")
    if request.group not in (None, weights.group):
        raise UsageError(f"--group {request.group}: {path} is a store in {weights}; convert the original again")
    if request.ffn_activation is not None:
        raise UsageError(f"--ffn-activation: {path} is a store, its activation was fixed when it was converted")


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80] or "model"
