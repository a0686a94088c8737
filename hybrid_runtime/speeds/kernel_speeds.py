"""How fast this machine's threads get through a token's operations, measured with the very programs that decode.

Random models are decoded for a moment, and the kernels' own time counters read by label. Two small ones, which a core's
caches hold, tell what an operation costs beyond its bytes (the barrier, the norm, handing out work), and what bytes in
the caches cost. A large one, which only memory holds, tells what rows cost that lie side by side (projections, gates of
all neurons) and rows of single neurons, which are fetched from all over.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from hybrid_kernels.activation import Activation
from hybrid_kernels.quantization.row_format import RowFormat, RowKind
from hybrid_kernels.team import Team
from hybrid_runtime.benchmarking.bytes_touched import BytesTouched, NeuronRows, bytes_touched
from hybrid_runtime.config import ModelConfig, RopeConfig
from hybrid_runtime.model.decoder import Decoder, PredictorMode
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.model.weights import DecoderWeights, load_weights
from hybrid_runtime.progress import NoProgress
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import Manifest
from hybrid_runtime.synthetic.shapes import Shape
from hybrid_runtime.synthetic.weights import Firing, SyntheticWeights

NUM_POSITIONS = 512
NUM_TOKENS = 24  # decoded at a time
NUM_ROUNDS = 9
QUANTILE = 0.25  # of the rounds: what others do on the machine only ever makes it slower
FIRING = Firing(0.12, 0.35)  # as TurboSparse-Mistral's neurons
SMALLEST_S = 1e-9


@dataclass(frozen=True, slots=True)
class KernelSpeeds:
    """Of one row format and number of threads. ..._per_s: bytes a second of all threads together; operation_s: what
    an operation takes beyond its bytes.

    cached: of weights that the caches hold; dense: of rows side by side in memory; sparse: of single neurons' rows,
    which take row_s each beyond their bytes.
    attention_value_s: what a position takes beyond its key's and value's bytes, for each value of a layer's queries.
    """

    row_kind: RowKind
    row_group: int
    num_threads: int
    operation_s: float
    row_s: float
    cached_bytes_per_s: float
    dense_bytes_per_s: float
    sparse_bytes_per_s: float
    attention_value_s: float

    def __post_init__(self) -> None:
        """Raise ValueError for speeds that nothing has."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} is {value}, expected a finite number >= 0")

    @property
    def row_format(self) -> RowFormat:
        """Of the rows that were read."""
        return RowFormat(self.row_kind, self.row_group)


@dataclass(frozen=True, slots=True)
class _Timed:
    """One model's decoding: bytes and seconds of a token by part, and its operations by part."""

    touched: BytesTouched
    num_rows: float
    seconds: dict[str, float]
    operations: dict[str, int]
    mean_length: float
    num_layers: int
    query_values: int


def measure_kernel_speeds(row_format: RowFormat, num_threads: int) -> KernelSpeeds:
    """Takes some ten seconds and, for the large model, 0.4 GiB of memory and of the temporary folder."""
    team = Team(num_threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tiny = _measured(_shape(128, 256, 4, 96), row_format, team, Path(folder) / "tiny", "off")
            small = _measured(_shape(512, 1280, 4, 64), row_format, team, Path(folder) / "small", "off")
            large = _shape(4096, 8192, 2 if row_format.kind == "q4" else 1, 256)
            masked = _measured(large, row_format, team, Path(folder) / "large", "mask")
            ungated = _measured(large, row_format, team, Path(folder) / "large", "off")
    finally:
        team.close()
    return _fitted(row_format, num_threads, tiny, small, masked, ungated)


def _fitted(
    row_format: RowFormat, num_threads: int, tiny: _Timed, small: _Timed, masked: _Timed, ungated: _Timed
) -> KernelSpeeds:
    """Solve for the costs, part after part: projections give the bytes' and the operations', neurons the rows'."""
    parts = ("attention", "head")
    few, many = ((_sum(each.seconds, parts), _sum(each.touched.by_part(), parts)) for each in (tiny, small))
    operations = sum(tiny.operations[part] for part in parts)  # both have as many
    per_byte = max((many[0] - few[0]) / (many[1] - few[1]), SMALLEST_S**2)
    operation_s = max((few[0] - few[1] * per_byte) / operations, SMALLEST_S)
    row_s = max(
        (each.seconds["neurons"] - operation_s * each.operations["neurons"] - each.touched.neurons * per_byte)
        / each.num_rows
        for each in (tiny, small)
    )
    row_s = max(row_s, 0.0)
    dense_parts = ("attention", "head", "predictor")
    dense_bytes = _sum(masked.touched.by_part(), dense_parts)
    dense_s = _sum(masked.seconds, dense_parts) - operation_s * sum(masked.operations[part] for part in dense_parts)
    dense = dense_bytes / max(dense_s, SMALLEST_S)
    sparse_s = masked.seconds["neurons"] - operation_s * masked.operations["neurons"] - row_s * masked.num_rows
    sparse = masked.touched.neurons / max(sparse_s, SMALLEST_S)
    values = ungated.mean_length * ungated.num_layers * ungated.query_values
    attention_s = ungated.seconds["KV cache"] - operation_s * ungated.num_layers - ungated.touched.kv_cache / dense
    return KernelSpeeds(
        row_format.kind,
        row_format.group,
        num_threads,
        operation_s,
        row_s,
        1 / per_byte,
        dense,
        sparse,
        max(attention_s / values, 0.0),
    )


def _sum(values: dict[str, float], parts: tuple[str, ...]) -> float:
    return sum(values[part] for part in parts)


def _shape(hidden_size: int, intermediate_size: int, num_layers: int, rank: int) -> Shape:
    """A dReLU model with predictors, as TurboSparse-Mistral is one."""
    head_dim = min(128, hidden_size // 4)
    heads = hidden_size // head_dim
    config = ModelConfig(
        family="bamboo",
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=head_dim,
        max_position_embeddings=NUM_POSITIONS,
        activation=Activation("drelu"),
        norm_eps=1e-5,
        rope=RopeConfig(1e4),
        predictor_input="post_norm",
    )
    return Shape(f"calibration-{hidden_size}", config, FIRING.active, (rank,) * num_layers)


def _measured(shape: Shape, row_format: RowFormat, team: Team, folder: Path, mode: PredictorMode) -> _Timed:
    quantization = Quantization(row_format)
    source = SyntheticWeights(shape, quantization, FIRING, seed=0)
    store = convert(Conversion(source, folder, quantization, shape.name, lambda _: None), NoProgress())
    return _timed(store.manifest, load_weights(store), team, mode)


def _timed(manifest: Manifest, weights: DecoderWeights, team: Team, mode: PredictorMode) -> _Timed:
    """Decode NUM_TOKENS tokens NUM_ROUNDS times; the lower quartiles of a token's seconds by label."""
    config = manifest.config
    decoder, cache = Decoder(config, weights, mode, team), KvCache(config, NUM_POSITIONS, "f16")
    rounds = list(_rounds(decoder, cache))
    labels = rounds[0][0]
    seconds = {label: float(torch.tensor([each[0][label] for each in rounds]).quantile(QUANTILE)) for label in labels}
    rows = NeuronRows(*(float(torch.tensor([each[1][kind] for each in rounds]).median()) for kind in range(3)))
    mean_length = (NUM_TOKENS + 1) / 2
    touched = bytes_touched(manifest, rows, uses_predictor=decoder.masks, mean_length=mean_length, kv_dtype="f16")
    program = decoder.program_of(cache)
    operations: dict[str, int] = {}
    for operation in program.operations:
        operations[operation.label] = operations.get(operation.label, 0) + 1
    for label in ("predictor", "router"):
        seconds.setdefault(label, 0.0)
        operations.setdefault(label, 0)
    query_values = config.num_attention_heads * config.head_dim
    num_rows = rows.gate + rows.up + rows.down
    return _Timed(touched, num_rows, seconds, operations, mean_length, config.num_hidden_layers, query_values)


def _rounds(decoder: Decoder, cache: KvCache) -> Iterator[tuple[dict[str, float], tuple[float, float, float]]]:
    """Seconds of a token by label, and its gate, up and down rows; after a round that warms up."""
    generator = torch.Generator().manual_seed(0)
    for round_idx in range(NUM_ROUNDS + 1):
        tokens = torch.randint(0, decoder.config.vocab_size, (NUM_TOKENS,), generator=generator)
        cache.truncate(0)
        decoder.forward(tokens[:1], cache)
        program = decoder.program_of(cache)
        program.reset_ticks()
        decoder.counters.reset()
        cache.truncate(0)
        for token in tokens:
            decoder.forward(token.view(1), cache)
        if round_idx == 0:
            continue
        ticks = program.ticks_by_label()
        per_tick = decoder.counters.kernel_s / max(1, sum(ticks.values()))
        counters = decoder.counters
        rows = (counters.gate_rows, counters.up_rows, counters.down_rows)
        yield (
            {label: count * per_tick / NUM_TOKENS for label, count in ticks.items()},
            (rows[0] / NUM_TOKENS, rows[1] / NUM_TOKENS, rows[2] / NUM_TOKENS),
        )
