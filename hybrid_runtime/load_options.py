"""What may be said about how a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hybrid_runtime.model.decoder import PredictorMode
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.progress import NoProgress, Progress
from hybrid_runtime.store.memory import LoadMode


def _say_nothing(message: str) -> None:
    del message


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded. Each None means that the model or the machine decides.

    ram_bytes: the promised peak of the process; what is too little for all neurons leaves some on disk, unless
    spreads is False. extra_bytes: that the caller will take of it; profiles: whether a model that is spread and has no
    profile gets one first. vram_bytes: of the GPU, or, where simulates_gpu is True, of one that is simulated in this
    process's memory, beside ram_bytes. num_positions: the context in tokens. predictor: a PredictorMode. kv_dtype: f32
    for an f32 store, else f16. scores: whether `logits` will be asked for, which takes more memory.
    load: the weights are read into memory, or mapped (they count against ram_bytes all the same).
    threads: that compute; None asks for `default_threads`.
    say: gets one line for each thing that the caller may want to know.
    """

    ram_bytes: int | None = None
    vram_bytes: int = 0
    simulates_gpu: bool = False
    spreads: bool = True
    extra_bytes: int = 0
    profiles: bool = True
    num_positions: int | None = None
    predictor: PredictorMode | None = None
    kv_dtype: KvDtype | None = None
    scores: bool = False
    load: LoadMode = "anonymous"
    threads: int | None = None
    cache_dir: Path | None = None
    progress: Progress = field(default_factory=NoProgress)
    say: Callable[[str], None] = _say_nothing
