"""The low-rank predictor against its two lines of linear algebra, and what is refused."""

import itertools

import pytest
import torch
from torch import nn

from hybrid_kernels.linear.reference import round_vectors
from hybrid_kernels.packed_matrix import PackedMatrix
from hybrid_kernels.quantization.op import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import GROUP_SIZES, RowFormat
from hybrid_predictors.mlp import MlpPredictor

F32 = RowFormat("f32")
FORMATS = [F32, RowFormat("bf16"), *(RowFormat(kind, group) for kind in ("q8", "q4") for group in GROUP_SIZES)]
SHAPES = {"T1-H1-R1-I1": (1, 1, 1, 1), "T3-H100-R33-I333": (3, 100, 33, 333), "T0-H64-R8-I8": (0, 64, 8, 8)}


def packed(weights: torch.Tensor, row_format: RowFormat = F32) -> PackedMatrix:
    return PackedMatrix(quantize_rows(weights, row_format), weights.shape[1], row_format)


def random_predictor(hidden_size, rank, num_neurons, row_format=F32, threshold=0.0) -> MlpPredictor:
    generator = torch.Generator().manual_seed(0)
    fc1 = torch.randn(rank, hidden_size, generator=generator) / hidden_size**0.5
    fc2 = torch.randn(num_neurons, rank, generator=generator) / rank**0.5
    return MlpPredictor(packed(fc1, row_format), packed(fc2, row_format), threshold)


def random_input(num_tokens, hidden_size) -> torch.Tensor:
    return torch.randn(num_tokens, hidden_size, generator=torch.Generator().manual_seed(1))


def as_torch(predictor: MlpPredictor) -> nn.Sequential:
    """The published module: two Linear layers without biases, in float64."""
    layers = []
    for matrix in (predictor.fc1, predictor.fc2):
        layer = nn.Linear(matrix.columns, matrix.num_rows, bias=False, dtype=torch.float64)
        layer.weight = nn.Parameter(dequantize_rows(matrix.rows, matrix.columns, matrix.row_format).double())
        layers.append(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1]).requires_grad_(False)


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_the_published_modules(shape, row_format, team):
    num_tokens, hidden_size, rank, num_neurons = shape
    predictor = random_predictor(hidden_size, rank, num_neurons, row_format)
    x = random_input(num_tokens, hidden_size)
    logits = predictor.logits(x, team)
    assert logits.shape == (num_tokens, num_neurons)
    published = as_torch(predictor)
    hidden = published[1](published[0](round_vectors(x, row_format).double()))
    expected = published[2](round_vectors(hidden.float(), row_format).double())
    # two float32 sums of at most 100 terms whose results are near 1: about sqrt(100) * 6e-8 each, with a margin of 3;
    # a hidden value so near a half that it is rounded to the other side moves a token's logits by a 127th of 1 or 2
    difference = (logits.double() - expected).abs().amax(dim=1) if num_tokens else torch.zeros(1)
    assert difference.max() <= (0.02 if row_format.is_quantized else 4e-6)
    assert difference.median() <= 4e-6


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
def test_threshold_zero_is_the_published_rounding_of_the_sigmoid(row_format, team):
    predictor, x = random_predictor(100, 33, 333, row_format), random_input(5, 100)
    published = predictor.logits(x, team).sigmoid().round()
    active = predictor.active(x, team)
    assert active.dtype == torch.bool
    assert torch.equal(active, published == 1)
    assert 0.3 < active.float().mean() < 0.7


def test_a_logit_at_the_threshold_does_not_fire(team):
    """round(sigmoid(0)) = round(0.5) = 0; exact numbers, so that there is a tie."""
    fc1, fc2 = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    x = torch.tensor([[0.5, 0.5], [-3.0, 0.75]])
    logits = [[0.5, 0.5, 0.0, -0.5], [0.0, 0.75, -0.75, 0.0]]  # the first feature of the second token is cut by relu
    assert MlpPredictor(packed(fc1), packed(fc2)).logits(x, team).tolist() == logits
    for threshold in (0.0, 0.5, -0.5, 0.75):
        active = MlpPredictor(packed(fc1), packed(fc2), threshold).active(x, team)
        assert active.tolist() == [[logit > threshold for logit in row] for row in logits]


def test_a_higher_threshold_leaves_a_subset(team):
    x = random_input(4, 100)
    active = [
        random_predictor(100, 33, 333, threshold=threshold).active(x, team) for threshold in (-1e9, -0.5, 0.0, 0.5, 1e9)
    ]
    assert active[0].all()
    assert not active[-1].any()
    counts = [each.sum().item() for each in active]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 5
    for lower, higher in itertools.pairwise(active):
        assert not (higher & ~lower).any()


def test_tokens_are_independent(team):
    predictor, x = random_predictor(100, 33, 333), random_input(5, 100)
    alone = torch.cat([predictor.logits(x[token : token + 1], team) for token in range(5)])
    # matrix times vector and matrix times matrix add up in another order
    torch.testing.assert_close(predictor.logits(x, team), alone, rtol=0, atol=4e-6)


@pytest.mark.parametrize("rank", [1, 7, 1024])
def test_rank_is_the_hidden_layers_width(rank):
    assert random_predictor(16, rank, 5).rank == rank


def test_matrices_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="fc2 reads 33 values, but fc1 makes 32"):
        MlpPredictor(packed(torch.ones(32, 64)), packed(torch.ones(5, 33)))


@pytest.mark.parametrize("x", [torch.ones(2, 63), torch.ones(64), torch.ones(2, 64, dtype=torch.float64)])
def test_an_input_that_does_not_fit_is_refused(x, team):
    with pytest.raises(ValueError, match=r"x is torch\..*, expected float32 \[T, 64\]"):
        random_predictor(64, 8, 5).active(x, team)


def test_a_predictor_is_a_value_that_nobody_changes():
    predictor = random_predictor(64, 8, 5)
    with pytest.raises(AttributeError):
        predictor.threshold = 1.0


@pytest.mark.parametrize("row_format", FORMATS, ids=str)
@pytest.mark.parametrize("rank", [8, 96, 130])
def test_rows_close_together_predict_the_same_from_fewer_bytes(row_format, rank, team):
    padded = random_predictor(70, rank, 200, row_format)
    close = MlpPredictor(padded.fc1.close_together(), padded.fc2.close_together())
    x = random_input(5, 70)
    for some in (x, x[:1]):
        ours, theirs = close.logits(some, team), padded.logits(some, team)
        if row_format == F32:  # torch's own product, whose order of sums follows the strides
            torch.testing.assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs)
    assert close.num_bytes == rank * row_format.close_row_bytes(70) + 200 * row_format.close_row_bytes(rank)
    assert padded.num_bytes == rank * row_format.row_bytes(70) + 200 * row_format.row_bytes(rank)
