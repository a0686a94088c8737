"""How fast this machine's threads get through a token's operations, measured with the very programs that decode.

Random models are decoded for a moment, and the kernels' own time counters read by label. Two small ones, which the
caches hold, tell what an operation costs beyond its rows (the barrier, the norm, handing out work), what a row costs
beyond its bytes, and what bytes cost there. A large one, of which the caches hold little from token to token, tells
what rows cost that lie side by side in memory, and rows of single neurons, which are fetched from all over; the same
one without its predictors, what gates cost that are all read, one row in three.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
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
from hybrid_runtime.speeds.projection_rows import projection_rows
from hybrid_runtime.store.convert import Conversion, convert
from hybrid_runtime.store.layout import Quantization
from hybrid_runtime.store.manifest import Manifest
from hybrid_runtime.synthetic.shapes import Shape
from hybrid_runtime.synthetic.weights import Firing, SyntheticWeights

NUM_TOKENS = 16  # decoded at a time
NUM_WARM_UPS = 4  # tokens before them
DEPTH = 64  # tokens before them, so that looking back takes long enough to be timed
NUM_ROUNDS = 9
FIRING = Firing(0.12, 0.35)  # as TurboSparse-Mistral's neurons
LARGE_BYTES = 100 << 20  # of projections that a token of the large model reads: several times the caches of today
SMALLEST_S = 1e-9
LEAST_PER_BYTE_S = 1e-12
"""A terabyte a second: no caches of a CPU are faster, and noise must not make them so."""


@dataclass(frozen=True, slots=True)
class KernelSpeeds:
    """Of one row format and number of threads. ..._per_s: bytes a second of all threads together.

    operation_s: what an operation takes beyond its rows; row_s: a single neuron's row beyond its bytes; cached: of
    weights that the caches hold; dense: of rows side by side in memory; sparse: of single neurons' rows; gates: of all
    neurons' gates, which lie one bundle apart.
    attention_value_s: what a position takes beyond its key's and value's bytes, for each value of a layer's queries.
    token_s: a token beyond its operations, the threads' waking and Python; dense_row_s: a projection's row beyond its
    bytes, where the caches hold them (memory is slower than that work, which is then done while it brings them);
    attend_s: attention's own operation beyond its positions and what any takes (rotation, the cache's new row).
    """

    row_kind: RowKind
    row_group: int
    num_threads: int
    operation_s: float
    row_s: float
    cached_bytes_per_s: float
    dense_bytes_per_s: float
    sparse_bytes_per_s: float
    gates_bytes_per_s: float
    attention_value_s: float
    token_s: float = 0.0
    dense_row_s: float = 0.0
    attend_s: float = 0.0

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
class Timed:
    """One model's decoding, per token: bytes, rows, seconds and operations by part. wall_s: from call to call.

    looked_at: query values times positions, over all layers.
    """

    touched: BytesTouched
    num_rows: dict[str, float]
    seconds: dict[str, float]
    operations: dict[str, int]
    wall_s: float
    looked_at: float


@dataclass(frozen=True, slots=True)
class _Round:
    """Of a token: seconds from call to call, seconds by label, gate, up and down rows."""

    wall_s: float
    seconds: dict[str, float]
    rows: tuple[float, float, float]


class KernelCalibration:
    """The models, made once; `measure` times them. Takes 0.5 GiB of memory, and of the folder."""

    def __init__(self, row_format: RowFormat, team: Team, folder: Path) -> None:
        self._row_format = row_format
        self._num_threads = team.num_threads
        large_layers = max(1, LARGE_BYTES // _attention_bytes(4096, row_format))
        shapes = (
            model_shape(128, 256, 4),
            model_shape(512, 1280, 4),
            model_shape(4096, 8192, large_layers, rank=256),
        )
        self._models = [
            CalibrationModel(manifest, Decoder(manifest.config, weights, mode, team))
            for manifest, weights in (_random_weights(shape, row_format, folder) for shape in shapes)
            for mode in modes_of(manifest)
        ]

    def measure(self, num_rounds: int = NUM_ROUNDS) -> KernelSpeeds:
        """Each model's median over its rounds. Takes some three seconds for nine rounds.

        The models take turns: a small one's rounds are over in some milliseconds each, and one moment of somebody
        else's would be all of them.
        """
        rounds: list[list[_Round]] = [[] for _ in self._models]
        for _ in range(num_rounds):
            for model, of_model in zip(self._models, rounds, strict=True):
                of_model.append(model.round())
        timed = [model.timed(of_model) for model, of_model in zip(self._models, rounds, strict=True)]
        return fitted(self._row_format, self._num_threads, *timed)


class CalibrationModel:
    """A random model in memory, as it decodes."""

    def __init__(self, manifest: Manifest, decoder: Decoder) -> None:
        self._manifest = manifest
        self._decoder = decoder
        self._cache = KvCache(manifest.config, DEPTH + NUM_TOKENS, "f16")
        self._generator = torch.Generator().manual_seed(0)
        for token in self._random(DEPTH):
            decoder.forward(token, self._cache)

    def round(self) -> _Round:
        """Decode NUM_TOKENS tokens at DEPTH, after some that bring it into the caches that can hold it."""
        self._decode(NUM_WARM_UPS)
        return self._decode(NUM_TOKENS)

    def timed(self, rounds: Sequence[_Round]) -> Timed:
        """By medians."""
        median_rows = NeuronRows(*(statistics.median(each.rows[kind] for each in rounds) for kind in range(3)))
        return _timed(
            self._manifest,
            self._decoder.masks,
            Counter(self._decoder.program_of(self._cache).labels()),
            median_rows,
            {label: statistics.median(each.seconds[label] for each in rounds) for label in rounds[0].seconds},
            statistics.median(each.wall_s for each in rounds),
        )

    def _decode(self, num_tokens: int) -> _Round:
        decoder, cache = self._decoder, self._cache
        tokens = self._random(num_tokens)
        cache.truncate(DEPTH)
        program, counters = decoder.program_of(cache), decoder.counters
        program.reset_ticks()
        counters.reset()
        started_s = time.perf_counter()
        for token in tokens:
            decoder.forward(token, cache)
        wall_s = (time.perf_counter() - started_s) / num_tokens
        ticks = program.ticks_by_label()
        per_tick = counters.kernel_s / max(1, sum(ticks.values())) / num_tokens
        rows = (counters.gate_rows / num_tokens, counters.up_rows / num_tokens, counters.down_rows / num_tokens)
        return _Round(wall_s, {label: count * per_tick for label, count in ticks.items()}, rows)

    def _random(self, count: int) -> torch.Tensor:
        """int64 [count, 1]."""
        return torch.randint(0, self._decoder.config.vocab_size, (count, 1), generator=self._generator)


def measure_kernel_speeds(row_format: RowFormat, num_threads: int, folder: Path) -> KernelSpeeds:
    """Takes some six seconds, 0.5 GiB of memory, and as much of the folder, which keeps it."""
    team = Team(num_threads)
    try:
        return KernelCalibration(row_format, team, folder).measure()
    finally:
        team.close()


def model_shape(hidden_size: int, intermediate_size: int, num_layers: int, rank: int = 0) -> Shape:
    """A dReLU model; with predictors of a rank, as TurboSparse-Mistral is one, or without, as the default model."""
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
        max_position_embeddings=DEPTH + NUM_TOKENS,
        activation=Activation("drelu"),
        norm_eps=1e-5,
        rope=RopeConfig(1e4),
        predictor_input="post_norm" if rank else None,
    )
    return Shape(f"calibration-{hidden_size}", config, FIRING.active, (rank,) * num_layers if rank else ())


def modes_of(manifest: Manifest) -> tuple[PredictorMode, ...]:
    """Ways of finding what fires that can be timed."""
    return ("mask", "gate") if manifest.predictor_ranks else ("gate",)


def _random_weights(shape: Shape, row_format: RowFormat, folder: Path) -> tuple[Manifest, DecoderWeights]:
    quantization = Quantization(row_format)
    source = SyntheticWeights(shape, quantization, FIRING, seed=0)
    store = convert(Conversion(source, folder / shape.name, quantization, shape.name, lambda _: None), NoProgress())
    return store.manifest, load_weights(store)


def _attention_bytes(hidden_size: int, row_format: RowFormat) -> int:
    """Of a layer's projections: keys and values have a quarter of the heads."""
    return hidden_size * 5 // 2 * row_format.row_bytes(hidden_size)


def fitted(
    row_format: RowFormat, num_threads: int, tiny: Timed, small: Timed, large: Timed, every_gate: Timed
) -> KernelSpeeds:
    """Solve for the costs, part after part: projections give theirs and the operations', neurons their rows'.

    every_gate: the large model, with all gates read.
    """
    parts = [(model, part) for model in (tiny, small) for part in ("attention", "head")]
    seconds = [model.seconds[part] for model, part in parts]
    operation_s, dense_row_s, per_byte = nonnegative_fit(
        [[model.operations[part], model.num_rows[part], _bytes(model, part)] for model, part in parts],
        seconds,
        seconds,
    )
    per_byte, operation_s = max(per_byte, LEAST_PER_BYTE_S), max(operation_s, SMALLEST_S)

    def beyond(model: Timed, part: str) -> float:
        return max(model.seconds[part] - operation_s * model.operations[part], SMALLEST_S)

    row_s = statistics.fmean(
        max(beyond(model, "neurons") - per_byte * model.touched.neurons, 0.0) / model.num_rows["neurons"]
        for model in (tiny, small)
    )
    dense_parts = ("attention", "head", "predictor")
    dense = sum(_bytes(large, part) for part in dense_parts) / sum(beyond(large, part) for part in dense_parts)
    sparse_s = max(beyond(large, "neurons") - row_s * large.num_rows["neurons"], SMALLEST_S)
    sparse = large.touched.neurons / sparse_s
    gate_bytes = every_gate.touched.neurons * every_gate.num_rows["gates"] / every_gate.num_rows["neurons"]
    others_s = row_s * every_gate.num_rows["neurons"] + (every_gate.touched.neurons - gate_bytes) / sparse
    gates_s = max(beyond(every_gate, "neurons") - others_s, gate_bytes * per_byte)
    looks = ((tiny, 1 / per_byte), (small, 1 / per_byte), (large, dense))
    attend_s, attention_value_s = nonnegative_fit(
        [[model.operations["KV cache"], model.looked_at] for model, _ in looks],
        [beyond(model, "KV cache") - model.touched.kv_cache / bytes_per_s for model, bytes_per_s in looks],
        [model.seconds["KV cache"] for model, _ in looks],
    )
    return KernelSpeeds(
        row_format.kind,
        row_format.group,
        num_threads,
        operation_s=operation_s,
        row_s=row_s,
        cached_bytes_per_s=1 / per_byte,
        dense_bytes_per_s=dense,
        sparse_bytes_per_s=sparse,
        gates_bytes_per_s=gate_bytes / gates_s,
        attention_value_s=attention_value_s,
        token_s=statistics.median(max(each.wall_s - _operations_s(each), 0.0) for each in (tiny, small, large)),
        dense_row_s=dense_row_s,
        attend_s=attend_s,
    )


def nonnegative_fit(rows: Sequence[Sequence[float]], seconds: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Costs >= 0 of each column, whose sums come closest to the seconds, by least squares of errors over scales."""
    weights = 1 / torch.tensor(scales, dtype=torch.float64).unsqueeze(1)
    scaled = torch.tensor(rows, dtype=torch.float64) * weights
    wanted = torch.tensor(seconds, dtype=torch.float64).unsqueeze(1) * weights
    widths = scaled.abs().amax(0)  # bytes are millions, operations few
    kept = list(range(len(rows[0])))
    while kept:
        solved = torch.linalg.lstsq(scaled[:, kept] / widths[kept], wanted)
        costs = solved.solution.squeeze(1) / widths[kept]
        if bool((costs >= 0).all()):
            found = dict(zip(kept, costs.tolist(), strict=True))
            return [found.get(idx, 0.0) for idx in range(len(rows[0]))]
        del kept[int((costs * widths[kept]).argmin())]
    return [0.0] * len(rows[0])


def _timed(
    manifest: Manifest,
    masks: bool,
    operations: dict[str, int],
    rows: NeuronRows,
    seconds: dict[str, float],
    wall_s: float,
) -> Timed:
    """With what a token of the model reads at DEPTH."""
    config = manifest.config
    mean_length = DEPTH + (NUM_TOKENS + 1) / 2
    touched = bytes_touched(manifest, rows, uses_predictor=masks, mean_length=mean_length, kv_dtype="f16")
    neurons = {"neurons": rows.gate + rows.up + rows.down, "gates": rows.gate}
    num_rows = projection_rows(manifest, uses_predictor=masks) | neurons
    query_values = config.num_attention_heads * config.head_dim
    return Timed(touched, num_rows, seconds, operations, wall_s, mean_length * config.num_hidden_layers * query_values)


def _bytes(model: Timed, part: str) -> float:
    return model.touched.by_part()[part]


def _operations_s(model: Timed) -> float:
    """Seconds of all operations but the first, which waits for the threads to wake."""
    return sum(seconds for label, seconds in model.seconds.items() if label != "begin")
