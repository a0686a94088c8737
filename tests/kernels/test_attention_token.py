"""attend: one token's attention over every kind of cache, against the reference over what the cache then holds."""

import pytest
import torch

from hybrid_kernels.attention import layout, reference
from hybrid_kernels.quantization.reference import dequantize_rows, quantize_rows
from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_kernels.rope.reference import apply_rope

from .kernel_calls import attend

Q8 = RowFormat("q8", layout.KV_GROUP)
KINDS = {"f32": layout.F32, "f16": layout.F16, "q8": layout.Q8}
# heads, key-value heads, head_dim, position, window
SHAPES = [
    (1, 1, 2, 0, None),
    (4, 2, 6, 9, None),
    (8, 1, 80, 40, None),
    (6, 6, 80, 40, 7),
    (3, 1, 7, 5, 1),
    (4, 2, 32, 300, 64),
    (8, 2, 64, 30, 31),
    (8, 2, 64, 30, 4096),
    (12, 4, 96, 3, None),
]
CASES = [(kind, shape) for kind in KINDS for shape in SHAPES if kind != "q8" or shape[2] % layout.KV_GROUP == 0]
cases = pytest.mark.parametrize(
    ("kind", "shape"),
    CASES,
    ids=[f"{kind}-heads{s[0]}-kv{s[1]}-D{s[2]}-P{s[3]}-window{s[4]}" for kind, s in CASES],
)
# As in test_attention.py: softmax weights sum to 1, values are near 1, a few float32 roundings of exp and of sums.
CLOSE = {"rtol": 0, "atol": 4e-6}


def packed(vectors, kind):
    """[S, kv_heads, D] as the cache of that kind holds it."""
    if kind == "q8":
        return quantize_rows(vectors.reshape(len(vectors), -1), Q8)
    return vectors.to(torch.float16 if kind == "f16" else torch.float32, copy=True)


def unpacked(cache, kind, shape):
    kv_heads, head_dim = shape[1:3]
    return (
        dequantize_rows(cache, kv_heads * head_dim, Q8).view(-1, kv_heads, head_dim) if kind == "q8" else cache.float()
    )


def attended(team, kind, shape, rotation=None, poison=None):
    """The output; keys and values of all positions, the new one's last, before the cache rounded them; the caches."""
    heads, kv_heads, head_dim, position, window = shape
    query, keys, values = torch.randn(heads, head_dim), *torch.randn(2, position + 1, kv_heads, head_dim)
    caches = [packed(each, kind) for each in (keys, values)]
    for cache in caches:
        cache[-1].view(torch.uint8).fill_(255)  # the new position is not there yet
        if poison is not None:
            cache[:poison].view(torch.uint8).fill_(255)
    width = kv_heads * head_dim
    new = [each[-1].clone().contiguous() for each in (keys, values)]
    found = attend(
        team,
        query.clone(),
        *new,
        caches,
        position,
        kind=KINDS[kind],
        stride=caches[0].stride(0) * caches[0].element_size(),
        value_bytes=Q8.value_bytes(width),
        window=window,
        rotation=rotation,
    )
    return found, query, keys, values, caches


@cases
def test_a_token_is_the_reference_over_what_the_cache_holds(kind, shape, team):
    found, query, _, _, caches = attended(team, kind, shape)
    keys, values = (unpacked(cache, kind, shape) for cache in caches)
    torch.testing.assert_close(found, reference.attention(query[None], keys, values, shape[3], shape[4])[0], **CLOSE)


@cases
def test_the_new_key_and_value_are_appended_as_the_batch_packs_them(kind, shape, team):
    """Bit for bit, scales of q8 included: prefill and decoding write one cache."""
    _, _, keys, values, caches = attended(team, kind, shape)
    for cache, vectors in zip(caches, (keys, values), strict=True):
        expected = packed(vectors, kind)
        used = Q8.value_bytes(shape[1] * shape[2]) + Q8.scale_bytes(shape[1] * shape[2]) if kind == "q8" else None
        assert torch.equal(cache[-1:, :used] if used else cache[-1:], expected[-1:, :used] if used else expected[-1:])


@pytest.mark.parametrize(
    ("kind", "shape"), [case for case in CASES if case[1][2] % 2 == 0], ids=lambda value: str(value).replace(" ", "")
)
def test_queries_and_keys_are_rotated(kind, shape, team):
    head_dim, position = shape[2:4]
    frequencies = 100.0 ** -(torch.arange(head_dim // 2) / head_dim)
    angles = position * frequencies
    found, query, keys, _, caches = attended(team, kind, shape, rotation=(angles.cos() * 1.1, angles.sin() * 1.1))
    at = torch.tensor([position])
    turned = apply_rope(query[None], at, frequencies, 1.1)
    held_keys, held_values = (unpacked(cache, kind, shape) for cache in caches)
    torch.testing.assert_close(
        found, reference.attention(turned, held_keys, held_values, position, shape[4])[0], **CLOSE
    )
    expected_key = unpacked(packed(apply_rope(keys[-1:], at, frequencies, 1.1), kind), kind, shape)
    # one level of q8, one rounding of f16: the two turn with products in another order
    torch.testing.assert_close(held_keys[-1:], expected_key, rtol=1e-3, atol=0.03 if kind == "q8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_outside_the_window_are_not_read(kind, team):
    shape = (4, 2, 32, 20, 4)
    found, query, _, _, caches = attended(team, kind, shape, poison=17)  # 17 ... 20 are seen
    keys, values = (unpacked(cache, kind, shape)[17:] for cache in caches)
    assert found.isfinite().all()
    torch.testing.assert_close(found, reference.attention(query[None], keys, values, 3)[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_large_scores_do_not_overflow(kind, team):
    shape = (2, 1, 32, 6, None)
    torch.default_generator.manual_seed(1)
    query, keys, values = torch.randn(2, 32) * 1e4, *torch.randn(2, 7, 1, 32)
    caches = [packed(each, kind) for each in (keys * 100, values)]
    found = attend(
        team,
        query,
        (keys[-1] * 100).contiguous(),
        values[-1].contiguous(),
        caches,
        6,
        kind=KINDS[kind],
        stride=caches[0].stride(0) * caches[0].element_size(),
        value_bytes=Q8.value_bytes(32),
    )
    assert found.isfinite().all()
    assert found.abs().max() <= unpacked(caches[1], kind, shape).abs().max() * 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_zero_vectors_are_cached_as_zeros(kind, team):
    zeros = torch.zeros(3, 2, 32)
    caches = [packed(zeros, kind), packed(zeros, kind)]
    found = attend(
        team,
        torch.randn(4, 32),
        torch.zeros(2, 32),
        torch.zeros(2, 32),
        caches,
        2,
        kind=KINDS[kind],
        stride=caches[0].stride(0) * caches[0].element_size(),
        value_bytes=Q8.value_bytes(64),
    )
    assert torch.equal(found, torch.zeros(4, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_does_not_depend_on_the_number_of_threads(kind, team, lone_team):
    outputs = []
    for each in (team, lone_team):
        torch.default_generator.manual_seed(0)
        outputs.append(attended(each, kind, (8, 4, 32, 50, None))[0])
    assert torch.equal(*outputs)
