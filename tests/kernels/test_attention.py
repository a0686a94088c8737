"""Attention over a cache: both twins against torch's own attention with an explicit mask, which shares no code."""

import pytest
import torch
from torch.nn import functional

from hybrid_kernels.attention import cpu, reference
from hybrid_kernels.attention.op import attention

# tokens, first position, heads, key-value heads, head_dim, window
SHAPES = [
    (1, 0, 1, 1, 1, None),
    (1, 9, 4, 2, 16, None),
    (1, 300, 8, 1, 6, 17),
    (2, 5, 4, 2, 8, None),
    (5, 0, 3, 3, 7, None),
    (7, 11, 6, 2, 32, None),
    (7, 11, 6, 2, 32, 1),
    (9, 30, 4, 4, 8, 5),
    (9, 3, 4, 2, 8, 12),
    (9, 3, 4, 2, 8, 4096),
    (40, 0, 2, 1, 10, 8),
    (33, 100, 4, 2, 10, 64),
]
shapes = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"T{s[0]}-P{s[1]}-heads{s[2]}-kv{s[3]}-D{s[4]}-window{s[5]}"
)
# Softmax weights sum to 1 and values are near 1, so errors are a few float32 roundings of exp and of sums of S <= 340.
CLOSE = {"rtol": 0, "atol": 4e-6}


def inputs(shape, dtype=torch.float32):
    num_tokens, first_position, heads, kv_heads, head_dim, _ = shape
    query = torch.randn(num_tokens, heads, head_dim)
    keys, values = torch.randn(2, first_position + num_tokens, kv_heads, head_dim).to(dtype)
    return query, keys, values


def expected(query, keys, values, shape) -> torch.Tensor:
    num_tokens, first_position, *_, window = shape
    mask = torch.zeros(num_tokens, first_position + num_tokens, dtype=torch.bool)
    for token in range(num_tokens):
        position = first_position + token
        for key_position in range(position + 1):
            mask[token, key_position] = window is None or position - key_position < window
    query, keys, values = (x.double().transpose(0, 1)[None] for x in (query, keys, values))
    mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    return mixed[0].transpose(0, 1).float()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_reference_is_torchs_attention(shape, dtype):
    query, keys, values = inputs(shape, dtype)
    found = reference.attention(query, keys, values, shape[1], shape[5])
    torch.testing.assert_close(found, expected(query, keys, values, shape), **CLOSE)


@shapes
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_cpu_is_the_reference_for_every_block_size(monkeypatch, shape, block, dtype):
    monkeypatch.setattr(cpu, "BLOCK_QUERIES", block)
    query, keys, values = inputs(shape, dtype)
    found = cpu.attention(query, keys, values, shape[1], shape[5])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference.attention(query, keys, values, shape[1], shape[5]), **CLOSE)


def test_keys_outside_the_window_are_not_read():
    query, keys, values = inputs((6, 20, 4, 2, 8, 4))
    keys[:17], values[:17] = torch.nan, torch.nan  # the query at 20 sees 17 ... 20
    assert cpu.attention(query, keys, values, 20, 4).isfinite().all()


def test_a_strided_cache_is_read_right():
    query, keys, values = inputs((3, 5, 4, 2, 8, None))
    cache = torch.full((2, 2, 64, 8), torch.nan)  # [keys or values, kv_heads, capacity, D]
    cache[0, :, :8], cache[1, :, :8] = keys.transpose(0, 1), values.transpose(0, 1)
    strided_keys, strided_values = (each[:, :8].transpose(0, 1) for each in cache)
    found = attention(query, strided_keys, strided_values, 5)
    torch.testing.assert_close(found, reference.attention(query, keys, values, 5), **CLOSE)


def test_large_scores_do_not_overflow():
    query, keys, values = inputs((4, 4, 2, 1, 16, None))
    assert attention(query * 1e4, keys * 1e4, values, 4).isfinite().all()


def test_tokens_in_two_steps_are_the_same_as_in_one():
    query, keys, values = inputs((9, 0, 4, 2, 8, None))
    steps = [attention(query[:5], keys[:5], values[:5], 0), attention(query[5:], keys, values, 5)]
    torch.testing.assert_close(torch.cat(steps), attention(query, keys, values, 0), **CLOSE)


@pytest.mark.parametrize(
    ("query", "keys", "values"),
    [
        ((2, 8), (2, 1, 8), (2, 1, 8)),
        ((2, 3, 8), (2, 2, 8), (2, 2, 8)),
        ((2, 4, 8), (2, 2, 8), (2, 2, 16)),
        ((2, 4, 8), (2, 2, 16), (2, 2, 16)),
        ((2, 4, 8), (2, 16), (2, 16)),
    ],
    ids=["query 2-D", "3 heads on 2", "values wider", "keys wider", "keys 2-D"],
)
def test_shapes_that_do_not_fit_are_refused(query, keys, values):
    with pytest.raises(ValueError, match=r"query \(2, .*, keys \(2, .*, values \(2, .* do not fit"):
        attention(torch.ones(query), torch.ones(keys), torch.ones(values), 0)


@pytest.mark.parametrize(("num_keys", "first_position"), [(6, 2), (4, 2), (0, 0), (2, -1)])
def test_a_number_of_keys_that_contradicts_the_position_is_refused(num_keys, first_position):
    keys = torch.ones(num_keys, 2, 8)
    with pytest.raises(ValueError, match=rf"{num_keys} keys for 3 tokens after {first_position}"):
        attention(torch.ones(3, 4, 8), keys, keys, first_position)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_the_token_itself_is_refused(window):
    keys = torch.ones(3, 2, 8)
    with pytest.raises(ValueError, match=f"window {window} is below 1"):
        attention(torch.ones(3, 4, 8), keys, keys, 0, window)
