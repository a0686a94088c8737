"""Seconds that a placement weighs: of bundles in each tier, of merges, of everything else on either side."""

from __future__ import annotations

from hybrid_runtime.benchmarking.bytes_touched import BytesTouched, NeuronRows
from hybrid_runtime.placement.decode_time import NEURON_OPERATIONS, DecodeConditions, DecodeTime, rows_seconds
from hybrid_runtime.placement.parts import PartKind
from hybrid_runtime.placement.problem import LayerCosts
from hybrid_runtime.speeds.disk import DiskSpeeds
from hybrid_runtime.speeds.gpu import GpuSpeeds
from hybrid_runtime.speeds.machine_speeds import MachineSpeeds
from hybrid_runtime.store.manifest import Manifest

READ_BYTES = 4096  # of a disk: whole pages
LAUNCHES_PER_LAYER = 3  # of a layer's hot neurons: gate and up, down, merge
VALUE_BYTES = 8  # of a cold neuron that fired, on its way to the GPU: its index and its activation


def layer_costs(
    manifest: Manifest,
    speeds: MachineSpeeds,
    conditions: DecodeConditions,
    rows: NeuronRows,
    gpu: GpuSpeeds | None,
    *,
    attention_on_gpu: bool = False,
) -> LayerCosts:
    """Of a layer of which a token reads these rows: seconds per bundle that is read whole.

    A row costs what the layer's rows cost on average, so that they add up to the prediction; down rows count by their
    share of what is read, which is far from a third where all gates are. The GPU reads at its memory's speed.
    """
    config, kernel = manifest.config, speeds.kernel(manifest.quantization.weights)
    row_bytes = manifest.quantization.weights.row_bytes(config.hidden_size)
    parts = 3 if config.activation.is_gated else 2
    num_rows = rows.gate + rows.up + rows.down
    if not num_rows:  # a layer that never fired: any row of its
        rows, num_rows = NeuronRows(parts - 2, 1, 1), parts
    cpu_s = rows_seconds(manifest, speeds, conditions, rows) * parts / num_rows
    down = parts * rows.down / num_rows  # rows of a bundle that is read whole
    operations_s = NEURON_OPERATIONS * kernel.operation_s
    disk_s = _disk_s(parts * row_bytes, speeds.disk)
    if gpu is None:
        return LayerCosts(
            cpu_s, cpu_s * (1 - down / parts), disk_s, 0.0, 0.0, operations_s, operations_s, operations_s, 0.0
        )
    vector_bytes = config.hidden_size * 4
    there_and_back_s = (
        gpu.round_trip_s + vector_bytes / gpu.to_gpu_bytes_per_s + vector_bytes / gpu.from_gpu_bytes_per_s
    )
    launches_s = LAUNCHES_PER_LAYER * gpu.launch_s
    hidden_way_s = gpu.round_trip_s + vector_bytes / gpu.from_gpu_bytes_per_s  # the input's; cold values pay their own
    return LayerCosts(
        cpu_s=cpu_s,
        cpu_without_down_s=cpu_s * (1 - down / parts) + down * VALUE_BYTES / gpu.to_gpu_bytes_per_s,
        disk_s=disk_s,
        gpu_s=parts * row_bytes / gpu.memory_bytes_per_s,
        gpu_down_s=down * row_bytes / gpu.memory_bytes_per_s,
        sync_s=operations_s + launches_s + there_and_back_s,
        hidden_sync_s=operations_s + launches_s + (hidden_way_s if attention_on_gpu else there_and_back_s),
        none_sync_s=operations_s + (there_and_back_s if attention_on_gpu else 0.0),
        all_gpu_sync_s=launches_s + (0.0 if attention_on_gpu else there_and_back_s),
    )


def gpu_part_seconds(touched: BytesTouched, manifest: Manifest, gpu: GpuSpeeds) -> dict[PartKind, float]:
    """Seconds of a token by kind of part, were all of it on the GPU: bytes, launches, the logits' way back."""
    config, speed = manifest.config, gpu.memory_bytes_per_s
    per_layer = 3 * gpu.launch_s * config.num_hidden_layers
    logits_s = gpu.round_trip_s + config.vocab_size * 4 / gpu.from_gpu_bytes_per_s
    return {
        "attention": (touched.attention + touched.norms + touched.router) / speed + per_layer,
        "KV cache": touched.kv_cache / speed,
        "head": touched.head / speed + gpu.launch_s + logits_s,
        "predictors": touched.predictor / speed + (per_layer if touched.predictor else 0.0),
    }


def cpu_part_seconds(time: DecodeTime) -> dict[PartKind, float]:
    """The same on the CPU, as predicted."""
    return {
        "embedding": time.embedding,
        "attention": time.attention + time.router,
        "KV cache": time.kv_cache,
        "head": time.head,
        "predictors": time.predictor,
    }


def _disk_s(bundle_bytes: int, disk: DiskSpeeds) -> float:
    """One read a bundle, of the pages that it lies on: as many as its bytes, and on average nearly one more."""
    pages = 1 + (bundle_bytes - 1) / READ_BYTES
    return max(1 / disk.small_reads_per_s, pages * READ_BYTES / disk.bytes_per_s)
