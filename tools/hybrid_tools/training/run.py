"""One training run in one folder: everything that is missing is made, everything that is there is gone on from.

run.json       the recipe, and the machine and command with which the run began; another recipe is refused
tokenizer/     trained on the text, or copied
corpus/        tokens, and the held-out documents as text
checkpoints/   the newest two states
log.jsonl      every step
model/         the finished model, a Hugging Face folder
curves.png     loss and sparsity over the run, where matplotlib is installed
"""

from __future__ import annotations

import importlib.util
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import filelock
import torch

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.errors import BudgetError, CheckpointError, NumericsError, UsageError
from hybrid_runtime.store.convert import DISK_IS_FULL
from hybrid_runtime.stores import DEFAULT_GROUP
from hybrid_tools.training.checkpoint import list_states, load_state
from hybrid_tools.training.corpus import Batches, Corpus
from hybrid_tools.training.held_out import HeldOut, mean_losses, read_held_out
from hybrid_tools.training.initial import checkpoint_weights, random_weights
from hybrid_tools.training.json_files import read_json
from hybrid_tools.training.pictures import draw_run
from hybrid_tools.training.preparation import (
    Begun,
    begin,
    decoder_config,
    make_recipe,
    prepare_corpus,
    prepare_tokenizer,
    refuse_hopeless,
    refuse_small_disk,
    weights_digest,
)
from hybrid_tools.training.published import NOTES_FILE, is_whole, write_model
from hybrid_tools.training.request import Display, RunRequest
from hybrid_tools.training.rounding import rounded_weights
from hybrid_tools.training.run_log import LOG_FILE, RunLog, training_seconds
from hybrid_tools.training.trainer import Trainer

MODEL_FOLDER = "model"
LARGEST_LOSS = 100.0  # nats a token; a model that knows nothing has the logarithm of its vocabulary, about 10
PICTURE = "curves.png"
TEST_SEQUENCES = 16  # of each file, while training; all of them at the end
ROUNDED = RowFormat("q8", DEFAULT_GROUP)  # what hybrid-convert makes unless it is told otherwise
SAVE_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def train(request: RunRequest, display: Display) -> Path:
    """Run to the end, from wherever the folder is; return the finished model's folder."""
    folder = request.folder
    if request.exports and not list_states(folder / "checkpoints"):
        raise UsageError(f"--export: {folder / 'checkpoints'} holds no checkpoint yet; train first")
    refuse_hopeless(request)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock", timeout=0):
            return _train_alone(request, display)
    except filelock.Timeout as error:
        raise UsageError(
            f"-o {folder}: another process is training here; wait for it, or name another folder"
        ) from error
    except BrokenPipeError:
        raise  # nobody reads our output any more: the program's business
    except OSError as error:
        remedy = "make room there" if error.errno in DISK_IS_FULL else "mend that, or name another folder"
        raise BudgetError(
            f"{error.filename or folder}: {error.strerror or error}; what was saved before is untouched: "
            f"{remedy} and run again"
        ) from error


def _train_alone(request: RunRequest, display: Display) -> Path:
    tokenizer = prepare_tokenizer(request, display)
    corpus = prepare_corpus(request, tokenizer, display)
    config = decoder_config(request, tokenizer)
    if request.source is None:
        weights, source = random_weights(config, request.seed), ""
    else:
        weights = checkpoint_weights(request.source, config)
        source = weights_digest(weights)
    batches = Batches(corpus, request.seed, request.optimisation.num_sequences, request.optimisation.seq_len)
    states = list_states(request.folder / "checkpoints")
    if not states:
        refuse_small_disk(request.folder, weights)
    begun = begin(request, make_recipe(request, config, corpus, source))
    trainer = Trainer(config, weights, request.optimisation, batches, torch.device(request.device))
    if states:
        trainer.restore(load_state(states[-1][1], weights))
    seq_len = request.optimisation.seq_len
    if not request.exports and trainer.num_steps_done < request.optimisation.num_steps:
        if states:
            display.say(f"going on after step {trainer.num_steps_done} of {request.optimisation.num_steps}")
        _steps(request, trainer, read_held_out(request.folder / "corpus", tokenizer, seq_len, TEST_SEQUENCES), display)
    if not _is_finished(request, trainer, begun):
        _finish(request, trainer, begun, corpus, read_held_out(request.folder / "corpus", tokenizer, seq_len), display)
    return request.folder / MODEL_FOLDER


def _steps(request: RunRequest, trainer: Trainer, held_out: HeldOut, display: Display) -> None:
    """Every step that is missing. Ctrl-C ends the step at hand, saves it, and is then heard."""
    optimisation = request.optimisation
    log = RunLog(request.folder / LOG_FILE, trainer.num_steps_done)
    try:
        with _deferred_interrupt() as interrupt:
            while trainer.num_steps_done < optimisation.num_steps:
                started_s = time.perf_counter()
                result = trainer.step()
                step_s = time.perf_counter() - started_s
                log.add(asdict(result) | {"seconds": round(step_s, 4)})
                display.step(result, optimisation.num_steps, optimisation.batch_tokens / step_s)
                is_last = result.step == optimisation.num_steps
                if held_out.sequences and not interrupt.came and (is_last or result.step % request.test_every == 0):
                    losses = mean_losses(trainer.config, trainer.weights, held_out)
                    log.add({"step": result.step, "held_out": losses})
                    display.say(f"step {result.step}: held-out loss {losses['all']:.4f}")
                if is_last or interrupt.came or result.step % request.save_every == 0:
                    trainer.save(request.folder / "checkpoints")
                if interrupt.came:
                    display.say(f"interrupted after step {result.step}, which is saved: the same command goes on")
                    raise KeyboardInterrupt
    finally:
        display.close()
        log.close()


def _is_finished(request: RunRequest, trainer: Trainer, begun: Begun) -> bool:
    """Whether model/ is this run's as of this step: a run that is only opened must not touch it."""
    folder = request.folder / MODEL_FOLDER
    if not is_whole(folder, request.folder / "tokenizer"):
        return False
    asked = {
        "recipe": begun.recipe,
        "num_steps_done": trainer.num_steps_done,
        "save_dtype": request.save_dtype,
        "rounded_to": request.round_to,
    }
    try:
        notes = read_json(folder / NOTES_FILE, tuple(asked))
    except CheckpointError:
        return False  # written by nobody we know, or cut short: written again
    return all(notes[key] == value for key, value in asked.items())


def _finish(
    request: RunRequest, trainer: Trainer, begun: Begun, corpus: Corpus, held_out: HeldOut, display: Display
) -> None:
    """Test the weights as they are written on everything that was held out; write the model and the picture."""
    dtype = SAVE_DTYPES[request.save_dtype]
    if request.round_to is None:
        weights = {name: weight.detach().to(dtype) for name, weight in trainer.weights.items()}
    else:
        weights = rounded_weights(trainer.config, trainer.weights, ROUNDED, dtype)
    losses = mean_losses(trainer.config, {name: weight.float() for name, weight in weights.items()}, held_out)
    if not all(math.isfinite(loss) and loss < LARGEST_LOSS for loss in losses.values()):
        raise NumericsError(
            f"{request.folder}: the run has diverged, its loss on held-out text is {losses['all']}; no model was "
            "written: begin a new run with a smaller --lr, or remove the newest checkpoint and --export the one before"
        )
    notes = {
        "made_by": "hybrid-train",
        "command": request.command,  # of the process that writes it, with the options that it was given
        "machine": begun.machine,
        "num_steps_done": trainer.num_steps_done,
        "num_steps": request.optimisation.num_steps,
        "tokens_seen": trainer.num_steps_done * request.optimisation.batch_tokens,
        "training_seconds": round(training_seconds(request.folder / LOG_FILE, trainer.num_steps_done), 1),
        "save_dtype": request.save_dtype,
        "rounded_to": request.round_to,
        "held_out_tokens": held_out.num_tokens,
        "held_out_losses": losses,
        "text": [
            {key: value for key, value in asdict(file).items() if key != "modified_ns"} for file in corpus.index.files
        ],
        "recipe": begun.recipe,
    }
    for name, loss in losses.items():
        display.say(f"held out {name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    if importlib.util.find_spec("matplotlib") is None:
        display.say("no curves.png was drawn: pip install 'hybrid-runtime[train]' brings matplotlib")
    else:
        draw_run(request.folder / LOG_FILE, request.folder / PICTURE)
    write_model(
        request.folder / MODEL_FOLDER, trainer.config, weights, request.folder / "tokenizer", notes
    )  # last: it ends the run


@dataclass(slots=True)
class _Interrupt:
    """Whether Ctrl-C was pressed."""

    came: bool = False


@contextmanager
def _deferred_interrupt() -> Iterator[_Interrupt]:
    """Ctrl-C is noted, so that it never falls into the middle of a step; pressed again it works at once."""
    interrupt = _Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.came:
            signal.default_int_handler(number, frame)
        interrupt.came = True

    if threading.current_thread() is not threading.main_thread():  # only that one may ask for signals
        yield interrupt
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
