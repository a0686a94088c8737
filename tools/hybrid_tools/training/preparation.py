"""What must be there before the first step: the decoder's description, tokenizer, corpus, recipe. All of it is checked
against the request when a run goes on, and made under a temporary name, so that half of anything is never found.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_kernels.activation import Activation
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, CheckpointError, UsageError
from hybrid_runtime.machine import cpu_name
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.strict_json import shown
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_tools.training.corpus import INDEX_FILE, Corpus, open_corpus, write_corpus
from hybrid_tools.training.documents import refuse_empty
from hybrid_tools.training.initial import with_activation, without_predictor
from hybrid_tools.training.json_files import read_json, remedy_for, write_json
from hybrid_tools.training.network import refuse_untrainable
from hybrid_tools.training.published import published_config
from hybrid_tools.training.recipe import Recipe
from hybrid_tools.training.request import Display, RunRequest
from hybrid_tools.training.vocabulary import TOKENIZER_FILES, copy_vocabulary, read_vocabulary, train_vocabulary

RECIPE_FILE = "run.json"
MADE_FROM = "made_from.json"
BYTES_PER_STATE_WEIGHT = 12  # the weight and AdamW's two moments


@dataclass(frozen=True, slots=True)
class Begun:
    """run.json: the recipe as JSON, and the machine and the command with which the run began."""

    recipe: Mapping[str, object]
    machine: str
    command: str


def refuse_hopeless(request: RunRequest) -> None:
    """Raise UsageError for what cannot work, before any work and any folder."""
    if request.source is not None:
        config = continued_config(request.source, request.activation)
        published_config(config, torch.float32)
    else:
        assert request.activation is not None
        config = request.shape.config(request.activation, max(1, request.vocab_size), None, 0)
    refuse_untrainable(config, request.optimisation.seq_len)
    if request.optimisation.seq_len > config.max_position_embeddings:
        raise UsageError(
            f"--seq-len {request.optimisation.seq_len} is more than the model's {config.max_position_embeddings} "
            "positions; use a shorter one, or a larger --context for a new model"
        )
    refuse_empty(request.files, request.held_out)


def continued_config(source: Checkpoint, activation: Activation | None) -> ModelConfig:
    """The source's decoder, with the activation that was asked for."""
    if activation is None:
        return without_predictor(source.config)
    return with_activation(source.config, activation)


def decoder_config(request: RunRequest, tokenizer: Tokenizer) -> ModelConfig:
    """The decoder that is trained. Raise UsageError when the tokenizer has more tokens than the source."""
    if request.source is None:
        assert request.activation is not None
        assert tokenizer.eos_id is not None
        return request.shape.config(request.activation, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    config = continued_config(request.source, request.activation)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the checkpoint's embedding {config.vocab_size} rows; "
            "name its own with --tokenizer"
        )
    return config


def prepare_tokenizer(request: RunRequest, display: Display) -> Tokenizer:
    """The run's tokenizer: what is there already, trained, or copied."""
    folder = request.folder / "tokenizer"
    existing = _existing_tokenizer(request)
    made_from = _tokenizer_origin(request, existing)
    if folder.is_dir():
        found = read_json(folder / MADE_FROM, (), folder)
        if found != made_from:
            raise UsageError(f"{folder}: was made from {found}, asked for {made_from}; name another folder")
        return read_vocabulary(folder)
    temporary = request.folder / "tokenizer.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    if existing is not None:
        copy_vocabulary(existing, temporary)
    else:
        display.say(f"training a vocabulary of {request.vocab_size} pieces")
        train_vocabulary(request.files, request.held_out, request.vocab_size, temporary)
    read_vocabulary(temporary)
    write_json(temporary / MADE_FROM, made_from)
    temporary.rename(folder)
    return read_vocabulary(folder)


def prepare_corpus(request: RunRequest, tokenizer: Tokenizer, display: Display) -> Corpus:
    """The run's text as tokens. Says what is held out, or that nothing is."""
    folder = request.folder / "corpus"
    if not (folder / INDEX_FILE).is_file():
        display.say(f"reading {len(request.files)} files of text")
        temporary = request.folder / "corpus.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        write_corpus(request.files, request.held_out, tokenizer, temporary)
        temporary.rename(folder)
    corpus = open_corpus(folder)
    corpus.refuse_other(request.files, request.held_out, str(folder))
    num_held_out = sum(file.num_held_out for file in corpus.index.files)
    display.say(
        f"{len(corpus.lengths)} documents, {len(corpus.tokens)} tokens, an epoch reads {corpus.tokens_per_epoch:.0f}; "
        + (f"{num_held_out} documents are held out" if num_held_out else _NOTHING_HELD_OUT)
    )
    return corpus


_NOTHING_HELD_OUT = (
    "NOTHING is held out, so nothing will be tested: use a larger --held-out, or part documents by <|endoftext|>"
)


def make_recipe(request: RunRequest, config: ModelConfig, corpus: Corpus, source: str) -> Recipe:
    """Everything that decides the result. source: digest of the weights that are continued, or nothing."""
    vocabulary = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = request.folder / "tokenizer" / name
        if path.is_file():
            vocabulary.update(name.encode() + path.read_bytes())
    return Recipe(
        config=config,
        optimisation=request.optimisation,
        seed=request.seed,
        source=source,
        corpus=corpus.digest(),
        vocabulary=vocabulary.hexdigest(),
        num_threads=request.num_threads,
        device=request.device,
        torch_version=torch.__version__,
    )


def begin(request: RunRequest, recipe: Recipe) -> Begun:
    """Write run.json, or read it and raise UsageError when the run was begun with another recipe."""
    path = request.folder / RECIPE_FILE
    if not path.is_file():
        begun = Begun(json.loads(json.dumps(recipe.to_json())), _machine(request), request.command)
        write_json(path, {"recipe": begun.recipe, "machine": begun.machine, "command": begun.command})
        return begun
    found = read_json(path, ("recipe", "machine", "command"))
    if not isinstance(found["recipe"], dict):
        raise CheckpointError(f"{path}: recipe is {shown(found['recipe'])}, expected an object; {remedy_for(path)}")
    begun = Begun(found["recipe"], str(found["machine"]), str(found["command"]))
    differences = recipe.differences(begun.recipe)
    if differences:
        raise UsageError(
            f"{path}: this run was begun with another recipe ({'; '.join(differences[:4])}); "
            "repeat its options to go on, or name another folder"
        )
    return begun


def refuse_small_disk(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Room for three states at once, while the third is being written, and the finished model."""
    needed = sum(weight.numel() for weight in weights.values()) * (3 * BYTES_PER_STATE_WEIGHT + 4)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BudgetError(
            f"{folder}: {format_bytes(free)} are free, checkpoints need {format_bytes(needed)}; "
            "make room, or name a folder on another disk"
        )


def weights_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Hex digest of what the weights are, wherever they came from."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _existing_tokenizer(request: RunRequest) -> Path | None:
    if request.tokenizer is not None or request.source is None:
        return request.tokenizer
    if request.source.gguf_metadata is not None:
        raise UsageError(
            f"--from {request.source.path}: the tokenizer inside a GGUF file cannot be copied; "
            "name one with --tokenizer"
        )
    return request.source.path


def _tokenizer_origin(request: RunRequest, existing: Path | None) -> dict[str, object]:
    """What decides the tokenizer, as JSON."""
    if existing is None:
        text = [[file.path.name, file.path.stat().st_size, file.weight] for file in request.files]
        return {"vocab_size": request.vocab_size, "held_out": request.held_out, "text": text}
    digest = hashlib.sha256()
    for path in [existing / name for name in TOKENIZER_FILES] if existing.is_dir() else [existing]:
        if path.is_file():
            digest.update(path.read_bytes())
    return {"copy_of": digest.hexdigest()}


def _machine(request: RunRequest) -> str:
    if request.device == "cpu":
        return f"{cpu_name()}, {request.num_threads} thread{'s' if request.num_threads > 1 else ''}"
    return torch.cuda.get_device_name()
