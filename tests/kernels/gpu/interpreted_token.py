"""Norms, rotary positions, attention and routing in Triton's interpreter (see interpreted.py)."""

import pytest
import torch

from hybrid_kernels.attention import reference as attention_reference
from hybrid_kernels.attention.gpu import BLOCK, NUM_SPLITS, LayerCache, attention
from hybrid_kernels.norm import gpu as norm_gpu
from hybrid_kernels.norm import reference as norm_reference
from hybrid_kernels.quantization.reference import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.rope import reference as rope_reference
from hybrid_kernels.rope.gpu import rotate_and_append
from hybrid_kernels.routing import gpu as routing_gpu
from hybrid_kernels.routing import reference as routing_reference

Q8 = RowFormat("q8", 32)
KINDS = ["f32", "f16", "q8"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1, 100, 256])
def test_norms(width):
    x, weight, bias = 3 + random(4, width), random(width, seed=1), random(width, seed=2)
    torch.testing.assert_close(norm_gpu.rms_norm(x, weight, 1e-5), norm_reference.rms_norm(x, weight, 1e-5))
    expected = norm_reference.layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(norm_gpu.layer_norm(x, weight, bias, 1e-5), expected, atol=1e-4, rtol=1e-4)
    assert norm_gpu.rms_norm(x[:0], weight, 1e-5).shape == (0, width)


def empty_cache(kind, num_positions, kv_heads, head_dim):
    if kind == "q8":
        shape, dtype = (num_positions, Q8.row_bytes(kv_heads * head_dim)), torch.uint8
    else:
        shape, dtype = (num_positions, kv_heads, head_dim), {"f32": torch.float32, "f16": torch.float16}[kind]
    return LayerCache(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), kv_heads, head_dim)


def filled_cache(kind, num_positions, kv_heads, head_dim):
    """The cache, and the keys and values that it stands for."""
    cache = empty_cache(kind, num_positions, kv_heads, head_dim)
    stored = []
    for tensor, seed in ((cache.keys, 1), (cache.values, 2)):
        vectors = random(num_positions, kv_heads, head_dim, seed=seed)
        tensor[:] = quantize_rows(vectors.view(num_positions, -1), Q8) if kind == "q8" else vectors
        stored.append(unpacked(tensor, kv_heads, head_dim))
    return cache, *stored


def unpacked(tensor, kv_heads, head_dim):
    if tensor.dtype != torch.uint8:
        return tensor.float()
    return dequantize_rows(tensor, kv_heads * head_dim, Q8).view(len(tensor), kv_heads, head_dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "length", "count", "window"),
    [(4, 2, 32, 1, 1, None), (8, 2, 32, 70, 1, None), (6, 6, 64, BLOCK["f16"] + 1, 2, None), (4, 1, 32, 200, 3, 65),
     (32, 1, 32, 40, 1, 1)],
)  # fmt: skip
def test_attention(kind, heads, kv_heads, head_dim, length, count, window):
    cache, keys, values = filled_cache(kind, length + 5, kv_heads, head_dim)  # what is beyond the tokens is not seen
    query = random(count, heads, head_dim, seed=3)
    first = length - count
    positions = torch.arange(first, length, dtype=torch.int32)
    expected = attention_reference.attention(query, keys[:length], values[:length], first, window)
    found = attention(query, cache, positions, window)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(found, attention(query, cache, positions, window))


def test_more_splits_than_blocks_leave_empty_ones():
    assert NUM_SPLITS * min(BLOCK.values()) > 10  # most splits of a short context have nothing to see
    cache, keys, values = filled_cache("f32", 10, 1, 32)
    query = 100 * random(1, 2, 32, seed=3)  # scores far from 0: an empty split's must not win
    found = attention(query, cache, torch.tensor([9], dtype=torch.int32))
    torch.testing.assert_close(found, attention_reference.attention(query, keys, values, 9), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotates", [False, True])
def test_keys_and_values_go_to_the_cache_rotated(kind, rotates):
    heads, kv_heads, head_dim, count = 4, 2, 64, 3
    queries, keys, values = (
        random(count, heads, head_dim),
        random(count, kv_heads, head_dim, seed=1),
        random(count, kv_heads, head_dim, seed=2),
    )
    positions = torch.tensor([5, 6, 7], dtype=torch.int32)
    frequencies = 1e4 ** -(torch.arange(32) / 32)
    angles = torch.arange(12).float().unsqueeze(1) * frequencies
    rotation = (1.5 * angles.cos(), 1.5 * angles.sin()) if rotates else None
    cache, rotated = empty_cache(kind, 12, kv_heads, head_dim), queries.clone()
    rotate_and_append(rotated, keys, values, rotation, positions, cache)
    if rotates:
        queries, keys = (
            rope_reference.apply_rope(each, positions.long(), frequencies, 1.5) for each in (queries, keys)
        )
    torch.testing.assert_close(rotated, queries, atol=1e-5, rtol=1e-5)
    for tensor, expected in ((cache.keys, keys), (cache.values, values)):
        stored = unpacked(tensor, kv_heads, head_dim)
        if kind == "q8":
            rows = quantize_rows(expected.reshape(count, -1), Q8)
            levels = dequantize_rows(rows, kv_heads * head_dim, Q8).view_as(expected)
            a_level = expected.abs().amax() / 127 * 1.01  # where two are nearly as near
            assert ((stored[5:8] - levels).abs() <= a_level).all()
            assert (stored[5:8] == levels).float().mean() > 0.99
        else:
            torch.testing.assert_close(stored[5:8], expected.to(tensor.dtype).float(), atol=1e-5, rtol=1e-5)
        assert not stored[:5].any()
        assert not stored[8:].any()


@pytest.mark.parametrize("score", routing_reference.ROUTER_SCORES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("num_experts", "chosen"), [(8, 2), (60, 6), (3, 3), (1, 1)])
def test_routing(score, normalize, num_experts, chosen):
    logits = random(5, num_experts) * 3
    experts, weights = routing_gpu.route(logits, chosen, score, normalize=normalize)
    expected_experts, expected_weights = routing_reference.route(logits, chosen, score, normalize=normalize)
    assert torch.equal(experts.long(), expected_experts)
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-5)


def test_the_first_of_equal_experts_is_chosen():
    experts, weights = routing_gpu.route(torch.zeros(1, 5), 2, "softmax")
    assert experts.tolist() == [[0, 1]]
    assert weights.tolist() == [[0.5, 0.5]]
