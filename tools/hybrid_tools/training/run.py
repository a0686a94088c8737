"""One training run in one folder: everything that is missing is made, everything that is there is gone on from.

run.json       the recipe; another recipe is refused here
tokenizer/     trained on the text, or copied
corpus/        tokens, and the held-out documents as text
checkpoints/   the newest two states
log.jsonl      every step
model/         the finished model, a Hugging Face folder
curves.png     loss and sparsity over the run, where matplotlib is installed
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import filelock
import torch

from hybrid_kernels.activation import Activation
from hybrid_runtime.checkpoints.checkpoint import Checkpoint
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.errors import BudgetError, UsageError
from hybrid_runtime.machine import cpu_name
from hybrid_runtime.sizes import format_bytes
from hybrid_runtime.text.tokenizer import Tokenizer
from hybrid_tools.training.checkpoint import list_states, load_state
from hybrid_tools.training.corpus import INDEX_FILE, Batches, Corpus, open_corpus, write_corpus
from hybrid_tools.training.documents import TextFile, refuse_empty
from hybrid_tools.training.held_out import HeldOut, mean_losses, read_held_out
from hybrid_tools.training.initial import checkpoint_weights, random_weights, with_activation, without_predictor
from hybrid_tools.training.network import refuse_untrainable
from hybrid_tools.training.pictures import draw_run
from hybrid_tools.training.published import published_config, write_model
from hybrid_tools.training.recipe import Optimisation, Recipe, Shape
from hybrid_tools.training.run_log import LOG_FILE, RunLog, training_seconds
from hybrid_tools.training.trainer import StepResult, Trainer
from hybrid_tools.training.vocabulary import TOKENIZER_FILES, copy_vocabulary, read_vocabulary, train_vocabulary

RECIPE_FILE = "run.json"
MODEL_FOLDER = "model"
PICTURE = "curves.png"
TEST_SEQUENCES = 16  # of each file, while training; all of them at the end
BYTES_PER_STATE_WEIGHT = 12  # the weight and AdamW's two moments
SAVE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What the user asked for. activation None: the source's own; source None: a new model of `shape`.

    tokenizer None: the source's, or one trained with vocab_size pieces. save_every, test_every: in steps.
    exports: whether to write the model as of the newest checkpoint instead of training on.
    """

    folder: Path
    files: tuple[TextFile, ...]
    optimisation: Optimisation
    shape: Shape
    activation: Activation | None
    source: Checkpoint | None
    tokenizer: Path | None
    vocab_size: int
    held_out: float
    seed: int
    num_threads: int
    device: str
    save_dtype: str
    save_every: int
    test_every: int
    exports: bool


class Display(Protocol):
    """What a run tells about itself."""

    def say(self, message: str) -> None:
        """One line."""

    def step(self, result: StepResult, num_steps: int, tokens_per_s: float) -> None:
        """A step is done."""

    def close(self) -> None:
        """No step follows."""


def train(request: RunRequest, display: Display) -> Path:
    """Run to the end, from wherever the folder is; return the finished model's folder."""
    folder = request.folder
    if request.exports and not list_states(folder / "checkpoints"):
        raise UsageError(f"--export: {folder / 'checkpoints'} holds no checkpoint yet; train first")
    refuse_empty(request.files, request.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            return _train_alone(request, display)
    except filelock.Timeout as error:
        raise UsageError(
            f"-o {folder}: another process is training here; wait for it, or name another folder"
        ) from error


def _train_alone(request: RunRequest, display: Display) -> Path:
    folder = request.folder
    config = None
    if request.source is not None:
        config = _continued_config(request.source, request.activation)
        refuse_untrainable(config, request.optimisation.seq_len)
        published_config(config, torch.float32)
    tokenizer = _tokenizer(request, display)
    corpus = _corpus(request, tokenizer, display)
    if config is None:
        assert request.activation is not None
        assert tokenizer.eos_id is not None
        config = request.shape.config(request.activation, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
    if tokenizer.vocab_size > config.vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the checkpoint's embedding {config.vocab_size} rows; "
            "name its own with --tokenizer"
        )
    recipe = _recipe(request, config, corpus)
    _settle_recipe(folder / RECIPE_FILE, recipe)
    device = torch.device(request.device)
    batches = Batches(corpus, request.seed, request.optimisation.num_sequences, request.optimisation.seq_len)
    weights = (
        random_weights(config, request.seed) if request.source is None else checkpoint_weights(request.source, config)
    )
    trainer = Trainer(config, weights, request.optimisation, batches, device)
    states = list_states(folder / "checkpoints")
    if states:
        trainer.restore(load_state(states[-1][1]))
        display.say(f"going on after step {trainer.num_steps_done} of {request.optimisation.num_steps}")
    else:
        _refuse_small_disk(folder, sum(weight.numel() for weight in weights.values()))
    held_out = read_held_out(folder / "corpus", tokenizer, request.optimisation.seq_len, TEST_SEQUENCES)
    if not request.exports:
        _steps(request, trainer, held_out, display)
    return _finish(request, recipe, trainer, corpus, tokenizer, display)


def _steps(request: RunRequest, trainer: Trainer, held_out: HeldOut, display: Display) -> None:
    """Every step that is missing."""
    optimisation = request.optimisation
    log = RunLog(request.folder / LOG_FILE, trainer.num_steps_done)
    try:
        while trainer.num_steps_done < optimisation.num_steps:
            started_s = time.perf_counter()
            result = trainer.step()
            step_s = time.perf_counter() - started_s
            log.add(asdict(result) | {"seconds": round(step_s, 4)})
            display.step(result, optimisation.num_steps, optimisation.batch_tokens / step_s)
            is_last = result.step == optimisation.num_steps
            if held_out.sequences and (is_last or result.step % request.test_every == 0):
                losses = mean_losses(trainer.config, trainer.weights, held_out)
                log.add({"step": result.step, "held_out": losses})
                display.say(f"step {result.step}: held-out loss {losses['all']:.4f}")
            if is_last or result.step % request.save_every == 0:
                trainer.save(request.folder / "checkpoints")
    finally:
        display.close()
        log.close()


def _finish(
    request: RunRequest,
    recipe: Recipe,
    trainer: Trainer,
    corpus: Corpus,
    tokenizer: Tokenizer,
    display: Display,
) -> Path:
    """Test on everything that was held out, write the model and the picture."""
    held_out = read_held_out(request.folder / "corpus", tokenizer, request.optimisation.seq_len)
    losses = mean_losses(trainer.config, trainer.weights, held_out)
    notes = {
        "made_by": "hybrid-train",
        "recipe": recipe.to_json(),
        "text": [asdict(file) for file in corpus.index.files],
        "tokens_seen": trainer.num_steps_done * request.optimisation.batch_tokens,
        "training_seconds": round(training_seconds(request.folder / LOG_FILE), 1),
        "machine": f"{cpu_name()}, {request.num_threads} threads" if request.device == "cpu" else _gpu_name(),
        "held_out_tokens": held_out.num_tokens,
        "held_out_losses": losses,
    }
    model = request.folder / MODEL_FOLDER
    write_model(
        model, trainer.config, trainer.weights, request.folder / "tokenizer", SAVE_DTYPES[request.save_dtype], notes
    )
    for name, loss in losses.items():
        display.say(f"held out {name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    _draw(request.folder, display)
    return model


def _draw(folder: Path, display: Display) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        display.say(
            f"no picture of {folder / LOG_FILE} was drawn: pip install 'hybrid-runtime[train]' brings matplotlib"
        )
        return
    draw_run(folder / LOG_FILE, folder / PICTURE)


def _continued_config(source: Checkpoint, activation: Activation | None) -> ModelConfig:
    """The source's decoder, with the activation that was asked for."""
    if activation is None:
        return without_predictor(source.config)
    return with_activation(source.config, activation)


def _tokenizer(request: RunRequest, display: Display) -> Tokenizer:
    """The run's tokenizer, made in another folder first, so that half of one is never found."""
    folder = request.folder / "tokenizer"
    if not folder.is_dir():
        temporary = request.folder / "tokenizer.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        existing = request.tokenizer or (request.source.path if request.source is not None else None)
        if request.tokenizer is None and request.source is not None and request.source.gguf_metadata is not None:
            raise UsageError(
                f"--from {request.source.path}: the tokenizer inside a GGUF file cannot be copied; "
                "name one with --tokenizer"
            )
        if existing is not None:
            copy_vocabulary(existing, temporary)
        else:
            display.say(f"training a vocabulary of {request.vocab_size} pieces")
            train_vocabulary(request.files, request.held_out, request.vocab_size, temporary)
        temporary.rename(folder)
    return read_vocabulary(folder)


def _corpus(request: RunRequest, tokenizer: Tokenizer, display: Display) -> Corpus:
    folder = request.folder / "corpus"
    if not (folder / INDEX_FILE).is_file():
        display.say(f"reading {len(request.files)} files of text")
        write_corpus(request.files, request.held_out, tokenizer, folder)
    corpus = open_corpus(folder)
    corpus.refuse_other(request.files, request.held_out, str(folder))
    display.say(
        f"{len(corpus.lengths)} documents, {len(corpus.tokens)} tokens; "
        f"an epoch reads {corpus.tokens_per_epoch:.0f}, repeats included"
    )
    return corpus


def _recipe(request: RunRequest, config: ModelConfig, corpus: Corpus) -> Recipe:
    tokenizer = request.folder / "tokenizer"
    vocabulary = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            vocabulary.update(name.encode() + (tokenizer / name).read_bytes())
    return Recipe(
        config=config,
        optimisation=request.optimisation,
        seed=request.seed,
        source="" if request.source is None else f"{request.source.path.resolve()} {request.source.fingerprint()[:16]}",
        corpus=corpus.digest(),
        vocabulary=vocabulary.hexdigest(),
        num_threads=request.num_threads,
        device=request.device,
        torch_version=torch.__version__,
    )


def _settle_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe, or refuse to go on with another one."""
    if not path.is_file():
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(recipe.to_json(), indent=1) + "\n")
        temporary.rename(path)
        return
    differences = recipe.differences(json.loads(path.read_text()))
    if differences:
        raise UsageError(
            f"{path}: this run was begun with another recipe ({'; '.join(differences[:4])}); "
            "repeat its options to go on, or name another folder"
        )


def _refuse_small_disk(folder: Path, num_weights: int) -> None:
    """Three states at once, while the third is being written, and the finished model."""
    needed = num_weights * (3 * BYTES_PER_STATE_WEIGHT + 4)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BudgetError(
            f"{folder}: {format_bytes(free)} are free, checkpoints need {format_bytes(needed)}; "
            "make room, or name a folder on another disk"
        )


def _gpu_name() -> str:
    return torch.cuda.get_device_name()
