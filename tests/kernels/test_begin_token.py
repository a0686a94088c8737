"""begin_token: the embedding's row as float32, a learned position added, and the angles of the rotary position."""

import numpy as np
import pytest
import torch

from hybrid_kernels.native.arguments import words
from hybrid_kernels.native.kernel_names import kernel
from hybrid_kernels.quantization.reference import dequantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_kernels.rope import layout
from hybrid_kernels.row_codes import format_code, num_groups, vector_columns
from hybrid_kernels.team import Operation

from .kernel_calls import nan_floats

FORMATS = [
    RowFormat("f32"),
    RowFormat("bf16"),
    *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES),
]
formats = pytest.mark.parametrize("row_format", FORMATS, ids=str)
WORDS = {
    "embed": ("EMBED_ROWS", "EMBED_STRIDE", "EMBED_CODE", "EMBED_GROUPS", "EMBED_VALUE_BYTES"),
    "learned": ("LEARNED_ROWS", "LEARNED_STRIDE", "LEARNED_CODE", "LEARNED_GROUPS", "LEARNED_VALUE_BYTES"),
}


def matrix_values(name, matrix):
    row_format, columns = matrix.row_format, matrix.columns
    values = (matrix.rows, matrix.rows.stride(0), format_code(row_format), num_groups(row_format, columns))
    values += (row_format.value_bytes(columns),)
    return {getattr(layout, word): value for word, value in zip(WORDS[name], values, strict=True)}


def begin(team, embedding, token, position, *, learned=None, offset=0, frequencies=(), magnitude=1.0):
    """The stream [H], cosines and sines [D / 2] of a token at a position."""
    width = vector_columns(embedding.row_format, embedding.columns)
    x, spare = nan_floats(width), nan_floats(width)
    cosines, sines = nan_floats(max(len(frequencies), 1)), nan_floats(max(len(frequencies), 1))
    place = np.array([token, position], dtype=np.int64)
    inverse = np.array(frequencies, dtype=np.float32)
    values = matrix_values("embed", embedding) | {
        layout.TOKEN: place,
        layout.X: x,
        layout.HIDDEN_SIZE: embedding.columns,
        layout.HALF_DIM: len(frequencies),
        layout.INVERSE_FREQUENCIES: inverse,
        layout.MAGNITUDE: float(magnitude),
        layout.COSINES: cosines,
        layout.SINES: sines,
    }
    if learned is not None:
        values |= matrix_values("learned", learned) | {layout.LEARNED_OFFSET: offset, layout.SPARE: spare}
    arguments = words(layout.NUM_WORDS, values)
    team.run(team.program([Operation(kernel("begin_token", embedding.row_format), "begin", arguments)]))
    return torch.from_numpy(x[: embedding.columns]), cosines, sines


def row_of(matrix, idx):
    return dequantize_rows(matrix.rows[idx : idx + 1], matrix.columns, matrix.row_format)[0]


@formats
@pytest.mark.parametrize("columns", [1, 33, 100, 256])
def test_the_stream_begins_as_the_tokens_row(row_format, columns, random_matrix, team):
    embedding = random_matrix(9, columns, row_format)
    for token in (0, 8, 3):
        assert torch.equal(begin(team, embedding, token, 5)[0], row_of(embedding, token))


@formats
@pytest.mark.parametrize("offset", [0, 2])
def test_a_learned_position_is_added(row_format, offset, random_matrix, team):
    embedding, learned = random_matrix(9, 100, row_format), random_matrix(12, 100, row_format, seed=1)
    found, _, _ = begin(team, embedding, 4, 7, learned=learned, offset=offset)
    assert torch.equal(found, row_of(embedding, 4) + row_of(learned, 7 + offset))


@pytest.mark.parametrize("position", [0, 1, 4095, 1_000_000])
@pytest.mark.parametrize("magnitude", [1.0, 1.3])
def test_angles_are_position_times_frequency(position, magnitude, random_matrix, team):
    frequencies = 10000.0 ** (-torch.arange(0, 80, 2) / 80)
    _, cosines, sines = begin(
        team, random_matrix(2, 8, RowFormat("f32")), 1, position, frequencies=frequencies.tolist(), magnitude=magnitude
    )
    angles = torch.tensor(position).float() * frequencies  # float32 angles are Hugging Face's
    for found, expected in ((cosines, angles.double().cos()), (sines, angles.double().sin())):
        np.testing.assert_allclose(found, (expected * magnitude).numpy(), rtol=0, atol=2e-7)


def test_without_rotary_positions_no_angle_is_written(random_matrix, team):
    _, cosines, sines = begin(team, random_matrix(2, 8, RowFormat("f32")), 1, 3)
    assert np.isnan(cosines).all()
    assert np.isnan(sines).all()
