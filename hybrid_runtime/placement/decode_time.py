"""How long one decoded token takes: bytes over measured speeds, and operations times what each costs besides.

On the CPU alone every part follows the one before, so the sum is the prediction. Where a GPU takes part, a placement
problem gets seconds for each active neuron (`layer_costs`) and adds the layers up itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from hybrid_runtime.benchmarking.bytes_touched import BytesTouched, NeuronRows, bytes_touched
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.model.kv_cache import KvDtype
from hybrid_runtime.placement.problem import LayerCosts
from hybrid_runtime.speeds.gpu import GpuSpeeds
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds
from hybrid_runtime.speeds.projection_rows import projection_rows
from hybrid_runtime.store.manifest import Manifest

CACHED_SHARE = 0.75  # of the last level's cache: what a model can take of it and still be read from there
READ_BYTES = 4096  # of a disk: bundles are read in whole pages
NEURON_OPERATIONS = 2  # of a layer: the rows, their sum
LAUNCHES_PER_LAYER = 3  # of a layer's hot neurons: gate and up, down, merge


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
    """rows: that one token reads, summed over layers; every_gate: whether the gates of all neurons are read, side by
    side, or those of named ones; mean_length: tokens that a token looks back on, its own included. predictor_bytes: of
    all layers' predictors that lie beside the store; None: those in it are used, if any.
    """

    rows: NeuronRows
    every_gate: bool
    uses_predictor: bool
    mean_length: float
    kv_dtype: KvDtype
    predictor_bytes: int | None = None


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
    rows_s = _neurons_s(manifest, conditions, touched, speed) + _num_rows(conditions.rows) * kernel.row_s
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


def layer_costs(
    manifest: Manifest, speeds: MachineSpeeds, conditions: DecodeConditions, gpu: GpuSpeeds | None
) -> LayerCosts:
    """Seconds per bundle that is read whole, alike in all layers.

    On the CPU a row costs what the rows of a token's neurons cost on average, so that they add up to the prediction.
    The GPU reads at its memory's speed and pays its launches with the sync: one copy of the input there, one of the
    partial sums (merge `output`: hidden_size floats) or of indices and values (`hidden`) over the bus.
    """
    config, kernel = manifest.config, speeds.kernel(manifest.quantization.weights)
    row = manifest.quantization.weights.row_bytes(config.hidden_size)
    speed = _speeds_of(manifest, speeds)
    rows = 3 if config.activation.is_gated else 2
    bundle_bytes = rows * row
    neurons_s = _neurons_s(manifest, conditions, token_bytes(manifest, conditions), speed)
    num_rows = _num_rows(conditions.rows)
    cpu_s = rows * (kernel.row_s + (neurons_s / num_rows if num_rows else row / speed.sparse))
    pages = -(-bundle_bytes // READ_BYTES)
    disk_s = max(pages / speeds.disk.small_reads_per_s, bundle_bytes / speeds.disk.bytes_per_s)
    if gpu is None:
        return LayerCosts(cpu_s, cpu_s * (rows - 1) / rows, disk_s, 0.0, 0.0, 0.0, 0.0)
    vector_s = config.hidden_size * 4 / gpu.to_gpu_bytes_per_s
    sync_s = gpu.round_trip_s + LAUNCHES_PER_LAYER * gpu.launch_s + 2 * vector_s
    return LayerCosts(
        cpu_s=cpu_s,
        cpu_without_down_s=cpu_s * (rows - 1) / rows + 8 / gpu.to_gpu_bytes_per_s,
        disk_s=disk_s,
        gpu_s=bundle_bytes / gpu.memory_bytes_per_s,
        gpu_down_s=row / gpu.memory_bytes_per_s,
        sync_s=sync_s,
        hidden_sync_s=gpu.round_trip_s + LAUNCHES_PER_LAYER * gpu.launch_s + vector_s,
    )


def gpu_part_seconds(touched: BytesTouched, config: ModelConfig, gpu: GpuSpeeds) -> dict[str, float]:
    """Seconds of a token by kind of part, were all of it on the GPU: its bytes and three launches an operation."""
    per_layer = 3 * gpu.launch_s * config.num_hidden_layers
    speed = gpu.memory_bytes_per_s
    return {
        "attention": (touched.attention + touched.norms + touched.router) / speed + per_layer,
        "KV cache": touched.kv_cache / speed,
        "head": touched.head / speed + gpu.launch_s,
        "predictors": touched.predictor / speed + per_layer,
    }


def cpu_part_seconds(time: DecodeTime, manifest: Manifest, speeds: MachineSpeeds) -> dict[str, float]:
    """The same on the CPU, as predicted. Attention's have what the neurons' operations cost beyond their rows."""
    operation_s = speeds.kernel(manifest.quantization.weights).operation_s
    return {
        "embedding": time.embedding,
        "attention": time.attention + time.router + NEURON_OPERATIONS * manifest.config.num_hidden_layers * operation_s,
        "KV cache": time.kv_cache,
        "head": time.head,
        "predictors": time.predictor,
    }


def _neurons_s(manifest: Manifest, conditions: DecodeConditions, touched: BytesTouched, speed: _Speeds) -> float:
    """Bundles interleave gates with the rest: reading all gates is neither reading along memory nor single rows."""
    if not conditions.every_gate:
        return touched.neurons / speed.sparse
    row = manifest.quantization.weights.row_bytes(manifest.config.hidden_size)
    gates = conditions.rows.gate * row
    return gates / speed.gates + (touched.neurons - gates) / speed.sparse


def _num_rows(rows: NeuronRows) -> float:
    return rows.gate + rows.up + rows.down


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
