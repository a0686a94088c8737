"""Random weights of a given shape as the source of a store, with sparsity planted where the model is sparse.

What is planted in an FFN whose predictor masks: unit 0 of the predictor reads the constant coordinate, so fc2's first
column is a bias for each neuron, chosen so that it fires as often as asked; gate and up read the constant too and are
positive, so that a neuron which is let through really fires. Where no predictor masks, the gate (or, without one, the
up projection) gets such a bias itself. A block at a time is drawn, calibrated and given away; nothing is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hybrid_kernels.quantization.op import dequantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.config import ModelConfig
from hybrid_runtime.store.layout import Entry, Quantization
from hybrid_runtime.synthetic.calibration import HiddenUnits, gate_biases, hidden_units, predictor_biases, rectified
from hybrid_runtime.synthetic.firing_rates import Shares, firing_rates
from hybrid_runtime.synthetic.random_rows import Bytes, clear_first, generator_of, plant_first, random_rows
from hybrid_runtime.synthetic.shapes import Shape
from hybrid_runtime.synthetic.stream import (
    ATTENTION_STD,
    CONSTANT,
    EMBEDDING_STD,
    FFN_STD,
    POSITION_STD,
    Stream,
    stream_before_ffn,
)

BLOCK_WEIGHTS = 1 << 22
SOURCE_PREFIX = "synthetic "  # of the fingerprint, which no checkpoint's has
VERSION = 1  # of what is drawn for the same arguments; another one is another store
POSITIVE_MEAN, POSITIVE_STD = 2.0, 0.5  # of gate and up values that are to be positive: 4 standard deviations
_SILU_SQUARE = 0.356  # mean of silu(x)^2 for a standard normal x


@dataclass(frozen=True, slots=True)
class Firing:
    """active: share of an FFN's neurons that fire for a token; skew: share of neurons that makes 80 % of firings."""

    active: float
    skew: float


@dataclass(frozen=True, slots=True)
class SyntheticWeights:
    """A WeightSource. firing: None where the activation leaves no exact zeros, and nothing is planted."""

    shape: Shape
    quantization: Quantization
    firing: Firing | None
    seed: int

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"synthetic {self.shape.name}"

    @property
    def config(self) -> ModelConfig:
        """The model's description."""
        return self.shape.config

    @property
    def largest_held_bytes(self) -> int:
        """A predictor's first layer, as float32, while its second is calibrated."""
        return 4 * max(self.shape.layer_ranks, default=0) * self.config.hidden_size

    def predictor_ranks(self) -> dict[str, int]:
        """Width of each embedded predictor by its FFN's prefix."""
        return self.shape.predictor_ranks()

    def fingerprint(self) -> str:
        """Everything that the bytes follow from, readable in the manifest."""
        firing = self.firing
        planted = f" active {firing.active} skew {firing.skew}" if firing else ""
        description = json.dumps([self.config.to_json(), self.predictor_ranks()], sort_keys=True)
        digest = hashlib.sha256(description.encode()).hexdigest()[:16]
        return f"{SOURCE_PREFIX}{VERSION}: like {self.shape.name} {digest} seed {self.seed}{planted}"

    def blocks(self, entry: Entry) -> Iterator[torch.Tensor]:
        """The entry's bytes in order, uint8."""
        if entry.kind == "vector":
            yield self._vector(entry).view(torch.uint8)
        elif entry.kind == "bundles":
            yield from map(torch.from_numpy, self._bundles(entry))
        else:
            yield from map(torch.from_numpy, self._rows(entry))

    def _vector(self, entry: Entry) -> torch.Tensor:
        """Biases 0 and norms 1, but for the last norm before a head that is the embedding."""
        if entry.name == "norm" and self.config.tie_word_embeddings:
            # Random signs, else every token's likeliest successor is itself; and logits of the usual size.
            signs = generator_of(self.seed, entry.name).integers(0, 2, entry.shape) * 2.0 - 1.0
            return torch.from_numpy(signs / math.sqrt(self.config.hidden_size)).float()
        return torch.full(entry.shape, 0.0 if entry.name.endswith(".bias") else 1.0)

    def _rows(self, entry: Entry) -> Iterator[Bytes]:
        num_rows, columns = entry.shape
        generator = generator_of(self.seed, entry.name)
        role = entry.name.rsplit(".", 1)[-1]
        is_calibrated = role == "fc2" and self.firing is not None
        units = self._hidden_units(entry) if is_calibrated else None
        rates = self._rates(entry.name.removesuffix(".predictor.fc2")) if is_calibrated else None
        for start, stop in _ranges(num_rows, columns):
            rows = random_rows(generator, stop - start, columns, entry.row_format, _std(role, columns))
            if units is not None and rates is not None:
                self._plant_biases(rows, entry, units, rates[start:stop])
            elif self.firing is not None:
                _plant_stream(rows, role, start, columns, entry.row_format)
            yield rows

    def _hidden_units(self, fc2: Entry) -> HiddenUnits:
        """Of the predictor whose fc2 this is: its fc1 is drawn once more."""
        ffn, rank = fc2.name.removesuffix(".fc2"), fc2.shape[1]
        fc1 = Entry(f"{ffn}.fc1", "rows", (rank, self.config.hidden_size), fc2.row_format, 0)
        rows = torch.from_numpy(np.concatenate(list(self._rows(fc1))))
        return hidden_units(dequantize_rows(rows, self.config.hidden_size, fc2.row_format), self._stream(fc2.name))

    def _plant_biases(self, rows: Bytes, fc2: Entry, units: HiddenUnits, rates: Shares) -> None:
        columns, row_format = fc2.shape[1], fc2.row_format
        plant_first(rows, columns, row_format, 0.0)
        dense = dequantize_rows(torch.from_numpy(rows), columns, row_format)
        biases = predictor_biases(dense, units, torch.from_numpy(rates), self.config.predictor_threshold)
        plant_first(rows, columns, row_format, biases.numpy())

    def _bundles(self, entry: Entry) -> Iterator[Bytes]:
        """[neurons, parts, row_bytes] blocks: gate (where there is one), up, transposed down."""
        num_neurons, num_parts, hidden_size = entry.shape
        ffn = entry.name.removesuffix(".bundles")
        generator = generator_of(self.seed, entry.name)
        rates = self._rates(ffn) if self.firing else np.full(num_neurons, 0.5)
        down_std = FFN_STD / math.sqrt(self._hidden_energy(rates))
        for start, stop in _ranges(num_neurons, hidden_size):
            count = stop - start
            inputs = [self._input_rows(generator, entry, part, rates[start:stop]) for part in range(num_parts - 1)]
            down = random_rows(generator, count, hidden_size, entry.row_format, down_std)
            if self.firing:
                clear_first(down, entry.row_format)
            yield np.stack([*inputs, down], axis=1)

    def _input_rows(self, generator: np.random.Generator, entry: Entry, part: int, rates: Shares) -> Bytes:
        """Gate or up rows: random, calibrated where they decide, positive where they must not."""
        hidden_size, row_format = self.config.hidden_size, entry.row_format
        decides = part == 0 and not self._is_masked
        is_positive = self.firing is not None and not decides and (self._is_masked or self._up_must_be_positive)
        gain = POSITIVE_STD if is_positive else 1.0
        rows = random_rows(generator, len(rates), hidden_size, row_format, gain / math.sqrt(hidden_size))
        if self.firing is None:
            return rows
        stream = self._stream(entry.name)
        if decides:
            plant_first(rows, hidden_size, row_format, 0.0)
            dense = dequantize_rows(torch.from_numpy(rows), hidden_size, row_format)
            threshold = self.config.activation.threshold
            biases = gate_biases(dense, stream, torch.from_numpy(rates), threshold)
            plant_first(rows, hidden_size, row_format, biases.numpy())
        elif is_positive:
            plant_first(rows, hidden_size, row_format, POSITIVE_MEAN * stream.rms / CONSTANT)
        return rows

    @property
    def _is_masked(self) -> bool:
        return self.config.predictor_input is not None

    @property
    def _up_must_be_positive(self) -> bool:
        return self.config.activation.kind == "drelu"

    def _hidden_energy(self, rates: Shares) -> float:
        """Sum over neurons of the mean square of what goes into the down projection."""
        positive = POSITIVE_MEAN**2 + POSITIVE_STD**2
        if self.firing is None:
            return len(rates) * _SILU_SQUARE
        if self._is_masked:
            return float(rates.sum()) * positive**2
        quantiles = torch.special.ndtri(torch.from_numpy(rates))
        mean, variance = rectified(quantiles, torch.ones_like(quantiles))
        return float((mean.square() + variance).sum()) * (positive if self._up_must_be_positive else 1.0)

    def _rates(self, ffn: str) -> Shares:
        """How often each neuron of this FFN fires: the same shares in every FFN, in another order."""
        assert self.firing is not None
        rates = firing_rates(self.config.intermediate_size, self.firing.active, self.firing.skew)
        generator_of(self.seed, f"{ffn}.rates").shuffle(rates)
        return rates

    def _stream(self, name: str) -> Stream:
        layer_idx = int(name.split(".", 2)[1])
        return stream_before_ffn(self.config, layer_idx, self.quantization.finer)


def _std(role: str, columns: int) -> float:
    """Standard deviation of a matrix's weights, so that what it makes of a normed input has this of 1."""
    match role:
        case "embed_tokens":
            return EMBEDDING_STD
        case "embed_positions":
            return POSITION_STD
        case "o_proj":
            return ATTENTION_STD / math.sqrt(columns)
        case _:
            return 1 / math.sqrt(columns)


def _plant_stream(rows: Bytes, role: str, start: int, columns: int, row_format: RowFormat) -> None:
    """What keeps the first coordinate constant, and the predictor's unit that reads it alone. start: of these rows."""
    if role == "embed_tokens":
        plant_first(rows, columns, row_format, CONSTANT)
    elif role == "embed_positions":
        clear_first(rows, row_format)
    elif role in ("o_proj", "fc1") and start == 0:
        rows[0] = 0  # scales too: a row of zeros in every format
        if role == "fc1":
            plant_first(rows[:1], columns, row_format, 1 / CONSTANT)


def _ranges(num_rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_WEIGHTS // columns)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)
