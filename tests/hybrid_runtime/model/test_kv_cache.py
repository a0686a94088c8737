"""The cache: what is appended comes back, as exactly as its type keeps it, in the memory that was promised."""

import pytest
import torch

from hybrid_kernels.attention.layout import KV_GROUP
from hybrid_runtime.errors import UsageError
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import parse_config
from hybrid_runtime.model.kv_cache import KV_DTYPES, KvCache, kv_cache_bytes, position_bytes

from .published_models import SPARSE_LLAMA

dtypes = pytest.mark.parametrize("dtype", KV_DTYPES)


def config_of(head_dim=32, **changes):
    return parse_config(RawConfig(SPARSE_LLAMA | {"head_dim": head_dim} | changes, "config.json"))


def vectors(num_tokens, config, seed=0):
    shape = (2, num_tokens, config.num_key_value_heads, config.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dtypes
@pytest.mark.parametrize("head_dim", [32, 64, 96])
def test_what_is_appended_comes_back(dtype, head_dim):
    config = config_of(head_dim)
    cache = KvCache(config, 10, dtype)
    first, second = vectors(3, config), vectors(2, config, seed=1)
    for layer_idx in range(config.num_hidden_layers):
        cache.append(layer_idx, *(first + layer_idx))
    cache.length += 3
    for layer_idx in range(config.num_hidden_layers):
        found = cache.append(layer_idx, *(second + layer_idx))
        for each, before, after in zip(found, first, second, strict=True):
            expected = torch.cat((before, after)) + layer_idx
            # f16 keeps 11 bits; q8 rounds to a 127th of the largest of 32 values, and its scale to 11 bits
            largest = (
                expected.view(5, config.num_key_value_heads, -1, KV_GROUP)
                .abs()
                .amax(-1)
                .repeat_interleave(KV_GROUP, -1)
            )
            bound = {"f32": 0 * largest, "f16": largest * 2**-11, "q8": largest * (0.51 / 127 + 2**-11)}[dtype]
            assert each.shape == expected.shape
            assert ((each.float() - expected).abs() <= bound).all()


@dtypes
def test_tokens_appended_one_by_one_are_the_same(dtype):
    config = config_of()
    new = vectors(4, config)
    together, apart = KvCache(config, 4, dtype), KvCache(config, 4, dtype)
    expected = together.append(0, *new)
    for token in range(4):
        found = apart.append(0, *new[:, token : token + 1])
        apart.length += 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@dtypes
def test_tokens_count_only_once_the_length_says_so(dtype):
    config = config_of()
    cache = KvCache(config, 4, dtype)
    cache.append(0, *vectors(3, config))
    assert cache.length == 0
    replaced = vectors(2, config, seed=1)
    keys, _ = cache.append(0, *replaced)
    assert keys.shape[0] == 2
    cache.length = 2
    cache.truncate(1)
    keys, _ = cache.append(0, *vectors(1, config, seed=2))
    assert keys.shape[0] == 2


@dtypes
@pytest.mark.parametrize("head_dim", [32, 96])
def test_the_memory_is_what_was_promised(dtype, head_dim):
    config = config_of(head_dim)
    cache = KvCache(config, 7, dtype)
    assert cache.keys.nbytes + cache.values.nbytes == kv_cache_bytes(config, 7, dtype)
    assert cache.num_positions == 7
    assert cache.keys[0].stride(0) * cache.keys.element_size() == position_bytes(config, dtype)


def test_q8_takes_little_more_than_half_of_f16():
    config = config_of(128, num_attention_heads=8, num_key_value_heads=8)
    assert kv_cache_bytes(config, 100, "q8") <= 0.54 * kv_cache_bytes(config, 100, "f16")


@pytest.mark.parametrize("head_dim", [8, 24, 48])
def test_q8_refuses_heads_that_are_no_whole_groups(head_dim):
    with pytest.raises(UsageError, match=rf"--kv-cache q8: head_dim {head_dim} is not a multiple of 32; use f16"):
        KvCache(config_of(head_dim), 4, "q8")
