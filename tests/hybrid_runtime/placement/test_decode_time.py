"""Seconds of a token: that they follow bytes, rows and operations as they should, and miss none of them."""

from collections import Counter
from dataclasses import asdict, replace

import pytest

from hybrid_kernels.quantization.row_format import RowFormat
from hybrid_runtime.benchmarking.bytes_touched import NeuronRows
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache
from hybrid_runtime.placement.decode_time import (
    CACHED_SHARE,
    _operations,
    predict_decode_time,
    token_bytes,
)

from ..model import published_models as models  # noqa: TID252  # absolute names are the runtime's
from ..model.tiny_models import load, write_folder  # noqa: TID252
from .made_up import (
    Q4,
    Q8,
    conditions_of,
    config_of,
    kernel_of,
    manifest_of,
    mixture_of,
    speeds_of,
)

DENSE = manifest_of(config_of())
MIXTURE = manifest_of(mixture_of(predictor_input="post_norm"))
ONLY_BYTES = {"operation_s": 0.0, "row_s": 0.0, "attention_value_s": 0.0}
PREDICTED = conditions_of(NeuronRows(90, 60, 60), every_gate=False, uses_predictor=True)


def seconds(manifest, conditions, cache_bytes=0, **kernel):
    return predict_decode_time(manifest, speeds_of(kernel_of(**kernel), cache_bytes=cache_bytes), conditions)


@pytest.mark.parametrize(("manifest", "conditions"), [(DENSE, conditions_of()), (MIXTURE, PREDICTED)])
def test_half_the_bandwidth_is_double_the_time_of_bytes(manifest, conditions):
    slow = seconds(
        manifest, conditions, **ONLY_BYTES, dense_bytes_per_s=10e9, sparse_bytes_per_s=5e9, gates_bytes_per_s=6e9
    )
    fast = seconds(
        manifest, conditions, **ONLY_BYTES, dense_bytes_per_s=20e9, sparse_bytes_per_s=10e9, gates_bytes_per_s=12e9
    )
    touched = token_bytes(manifest, conditions)
    for name, value in asdict(slow).items():
        assert value == pytest.approx(2 * getattr(fast, name))
        assert (value > 0) == (getattr(touched, name) > 0)
    assert fast.tokens_per_s == pytest.approx(2 * slow.tokens_per_s)
    rest = touched.total - touched.neurons
    assert slow.total_s - slow.neurons == pytest.approx(rest / 10e9)


def test_gates_that_are_all_read_have_a_speed_of_their_own():
    row = Q4.row_bytes(64)
    only = ONLY_BYTES | {"sparse_bytes_per_s": 10e9, "gates_bytes_per_s": 20e9}
    every = seconds(DENSE, conditions_of(NeuronRows(100, 7, 3)), **only)
    assert every.neurons == pytest.approx(100 * row / 20e9 + 10 * row / 10e9)
    named = seconds(DENSE, conditions_of(NeuronRows(100, 7, 3), every_gate=False), **only)
    assert named.neurons == pytest.approx(110 * row / 10e9)
    with_rows = seconds(DENSE, conditions_of(NeuronRows(100, 7, 3)), **(only | {"row_s": 1e-6}))
    assert with_rows.neurons == pytest.approx(every.neurons + 110e-6)


def test_what_the_caches_hold_is_read_from_there():
    held = sum(part.num_bytes for part in DENSE.parts if part.file != "embed.bin")
    enough = -int(-held // CACHED_SHARE) + 1
    cached = seconds(DENSE, conditions_of(), enough, **ONLY_BYTES, cached_bytes_per_s=64e9)
    assert cached.total_s == pytest.approx(token_bytes(DENSE, conditions_of()).total / 64e9)
    from_memory = seconds(DENSE, conditions_of(), int(held / CACHED_SHARE) - 2, **ONLY_BYTES)
    assert from_memory == seconds(DENSE, conditions_of(), 0, **ONLY_BYTES)
    assert from_memory.total_s > cached.total_s
    tied = manifest_of(config_of(tie_word_embeddings=True))  # its embedding is the head
    assert seconds(tied, conditions_of(), enough, **ONLY_BYTES).head == pytest.approx(cached.head, rel=0.05)


def test_attention_takes_longer_the_more_it_looks_at():
    only = {"operation_s": 0.0, "row_s": 0.0, "attention_value_s": 1e-9}
    short, long = (seconds(DENSE, conditions_of(mean_length=length), **only) for length in (10.0, 20.0))
    assert long.kv_cache == pytest.approx(2 * short.kv_cache)
    assert replace(long, kv_cache=0.0) == replace(short, kv_cache=0.0)
    plain = seconds(DENSE, conditions_of(mean_length=10.0), **ONLY_BYTES)
    assert short.kv_cache - plain.kv_cache == pytest.approx(3 * 10 * 4 * 16 * 1e-9)
    windows = manifest_of(config_of(sliding_windows=(None, 5, 5)))
    looked = seconds(windows, conditions_of(mean_length=10.0), **only)
    assert looked.kv_cache == pytest.approx(short.kv_cache * 20 / 30)


CASES = {
    "dense-predictors": (models.TURBOSPARSE_MISTRAL, lambda: models.dense_tensors(models.RANKS)),
    "mixture-predictors": (models.TURBOSPARSE_MIXTRAL, models.turbosparse_mixtral_tensors),
    "dense": (models.SPARSE_LLAMA, models.dense_tensors),
}


@pytest.mark.parametrize("row_format", [Q4, Q8, RowFormat("f32")], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_operation_of_the_program_is_counted(name, row_format, lone_team, tmp_path):
    config, make = CASES[name]
    model = load(write_folder(tmp_path / "original", config, make()), tmp_path / "store", row_format)
    for mode in ("off", *(["mask"] if model.config.predictor_input else [])):
        decoder = Decoder(model.config, model.weights, mode, lone_team)
        labels = Counter(each.label for each in decoder.program_of(KvCache(model.config, 8, "f16")).operations)
        counted = _operations(model.store.manifest, conditions_of(uses_predictor=decoder.masks))
        names = {"begin": "embedding", "KV cache": "kv_cache"}
        assert {names.get(label, label): count for label, count in labels.items()} == {
            part: count for part, count in counted.items() if count
        }
        only = {
            "row_s": 0.0,
            "attention_value_s": 0.0,
            "dense_bytes_per_s": 1e30,
            "sparse_bytes_per_s": 1e30,
            "gates_bytes_per_s": 1e30,
        }
        speeds = speeds_of(kernel_of(row_format, operation_s=1.0, **only))
        time = predict_decode_time(model.store.manifest, speeds, conditions_of(uses_predictor=decoder.masks))
        assert time.total_s == pytest.approx(sum(labels.values()))


def test_predictors_beside_the_store_are_read_too():
    beside = replace(PREDICTED, predictor_bytes=100_000)
    assert token_bytes(DENSE, beside).predictor == 100_000
    assert token_bytes(MIXTURE, beside).predictor == 50_000  # two of four experts
    assert token_bytes(MIXTURE, PREDICTED).predictor != 50_000
    assert token_bytes(DENSE, conditions_of(predictor_bytes=100_000)).predictor == 0
    assert seconds(DENSE, beside, **ONLY_BYTES, dense_bytes_per_s=10e9).predictor == pytest.approx(1e-5)


def test_all_rows_are_read_as_fast_as_any_that_lie_side_by_side():
    rows, row = NeuronRows(100, 100, 100), Q4.row_bytes(64)
    only = ONLY_BYTES | {"cached_bytes_per_s": 1e30, "dense_bytes_per_s": 30e9, "sparse_bytes_per_s": 10e9}
    conditions = conditions_of(rows, every_row=True)
    assert seconds(DENSE, conditions, **only).neurons == pytest.approx(300 * row / 30e9)
    assert seconds(DENSE, conditions, **(only | {"dense_row_s": 1e-6})).neurons == pytest.approx(300e-6)
