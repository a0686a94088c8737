"""How long one decoded token takes: bytes over measured speeds, and operations times what each costs besides.

On the CPU alone every part follows the one before, so the sum is the prediction. Where a GPU takes part, costs.py has
what a placement problem needs to add the layers up itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hybrid_runtime.benchmarking.bytes_touched import BytesTouched, NeuronRows, bytes_touched
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds
from hybrid_runtime.speeds.projection_rows import projection_rows
from hybrid_runtime.store.manifest import Manifest

CACHED_SHARE = 0.75  # of the last level's cache: what a model can take of it and still be read from there
NEURON_OPERATIONS = 2  # of a layer: the rows, their sum


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """Seconds of one token by part; `attention` has the projections, `kv_cache` scores and mixing.

    `embedding` has what a token takes beyond its operations: the threads' waking, and Python.
    """

    embedding: float
    attention: float
    kv_cache: float
    router: float
    predictor: float
    neurons: float
    head: float

    @property
    def total_s(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()))

    @property
    def tokens_per_s(self) -> float:
        """Of decoding alone."""
        return 1 / self.total_s


@dataclass(frozen=True, slots=True)
class DecodeConditions:
    """rows: that one token reads, summed over layers; every_gate: whether the gates of all neurons are read, or those
    of named ones; every_row: whether all rows are; mean_length: tokens that a token looks back on, its own included.
    predictor_bytes: of all layers' predictors that lie beside the store; None: those in it are used, if any.
    """

    rows: NeuronRows
    every_gate: bool
    uses_predictor: bool
    mean_length: float
    kv_dtype: KvDtype
    predictor_bytes: int | None = None
    every_row: bool = False


@dataclass(frozen=True, slots=True)
class _Speeds:
    """Bytes a second of rows side by side, of all neurons' gates, and of single neurons' rows."""

    dense: float
    gates: float
    sparse: float


def token_bytes(manifest: Manifest, conditions: DecodeConditions) -> BytesTouched:
    """That one token reads."""
    touched = bytes_touched(
        manifest,
        conditions.rows,
        uses_predictor=conditions.uses_predictor,
        mean_length=conditions.mean_length,
        kv_dtype=conditions.kv_dtype,
    )
    if conditions.predictor_bytes is None or not conditions.uses_predictor:
        return touched
    config = manifest.config
    routed = config.num_experts_per_tok / config.num_experts if config.num_experts else 1.0
    return replace(touched, predictor=conditions.predictor_bytes * routed)


def predict_decode_time(manifest: Manifest, speeds: MachineSpeeds, conditions: DecodeConditions) -> DecodeTime:
    """For the CPU alone."""
    config = manifest.config
    touched = token_bytes(manifest, conditions)
    kernel = speeds.kernel(manifest.quantization.weights)
    speed = _speeds_of(manifest, speeds)
    operations = _operations(manifest, conditions)
    looked_at = _positions(config, conditions.mean_length) * config.num_attention_heads * config.head_dim
    rows_s = rows_seconds(manifest, speeds, conditions, conditions.rows)
    extra = {name: count * kernel.operation_s for name, count in operations.items()}
    attend_s = operations["kv_cache"] * kernel.attend_s
    rows = projection_rows(manifest, uses_predictor=conditions.uses_predictor)

    def projection_s(part: str, num_bytes: float) -> float:
        """Memory brings rows while others are worked on, so the slower of both counts."""
        worked_on_s = rows[part] * kernel.dense_row_s + num_bytes / kernel.cached_bytes_per_s
        return extra[part] + max(worked_on_s, num_bytes / speed.dense)

    return DecodeTime(
        embedding=kernel.token_s + extra["embedding"] + touched.embedding / speed.dense,
        attention=projection_s("attention", touched.attention + touched.norms),
        kv_cache=extra["kv_cache"] + attend_s + touched.kv_cache / speed.dense + looked_at * kernel.attention_value_s,
        router=projection_s("router", touched.router),
        predictor=projection_s("predictor", touched.predictor),
        neurons=extra["neurons"] + rows_s,
        head=projection_s("head", touched.head),
    )


def rows_seconds(manifest: Manifest, speeds: MachineSpeeds, conditions: DecodeConditions, rows: NeuronRows) -> float:
    """Of neurons' rows on the CPU: of all that a token reads, or of some of them.

    Bundles interleave gates with the rest, so reading all gates is neither reading along memory nor single rows.
    """
    kernel, speed = speeds.kernel(manifest.quantization.weights), _speeds_of(manifest, speeds)
    row_bytes = manifest.quantization.weights.row_bytes(manifest.config.hidden_size)
    num_rows = rows.gate + rows.up + rows.down
    if conditions.every_row:
        in_order_s = row_bytes / kernel.cached_bytes_per_s + kernel.dense_row_s
        return num_rows * max(in_order_s, row_bytes / speed.dense)
    gates = rows.gate * row_bytes / (speed.gates if conditions.every_gate else speed.sparse)
    return gates + (rows.up + rows.down) * row_bytes / speed.sparse + num_rows * kernel.row_s


def _speeds_of(manifest: Manifest, speeds: MachineSpeeds) -> _Speeds:
    """The caches' where they hold what tokens read."""
    kernel = speeds.kernel(manifest.quantization.weights)
    embedding = sum(part.num_bytes for part in manifest.parts if part.file == "embed.bin")
    held = sum(part.num_bytes for part in manifest.parts) - (0 if manifest.config.tie_word_embeddings else embedding)
    if held <= CACHED_SHARE * speeds.cache_bytes:
        return _Speeds(*3 * (kernel.cached_bytes_per_s,))
    return _Speeds(kernel.dense_bytes_per_s, kernel.gates_bytes_per_s, kernel.sparse_bytes_per_s)


def _positions(config: ModelConfig, mean_length: float) -> float:
    """Positions that a token looks at, over all layers."""
    windows = [config.window(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    return sum(mean_length if window is None else min(mean_length, window) for window in windows)


def _operations(manifest: Manifest, conditions: DecodeConditions) -> dict[str, int]:
    """Of token_program.py, by part."""
    config, quantization = manifest.config, manifest.quantization
    layers = config.num_hidden_layers
    has_finer_keys = quantization.finer != quantization.weights and config.num_key_value_heads < (
        config.num_attention_heads
    )
    return {
        "embedding": 1,
        "attention": (3 if has_finer_keys else 2) * layers,  # keys of another format are projected apart
        "kv_cache": layers,
        "router": 2 * layers if config.num_experts else 0,
        "predictor": 2 * layers if conditions.uses_predictor else 0,
        "neurons": NEURON_OPERATIONS * layers,
        "head": 1,
    }
