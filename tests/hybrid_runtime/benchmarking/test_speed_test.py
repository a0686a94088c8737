"""Timed tests run over a decoder that only notes what it was asked."""

from dataclasses import dataclass, replace

import pytest
import torch

from hybrid_runtime.benchmarking.speed_test import Measurement, Sample, SpeedTest, deviation, measure
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.model.kv_cache import KvCache

from .test_bytes_touched import MISTRAL

CONFIG = replace(
    MISTRAL, vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=4,
)  # fmt: skip


@dataclass
class Counters:
    kernel_s: float = 0.0
    tokens: int = 0
    active_neurons: int = 0
    gate_rows: int = 0
    up_rows: int = 0
    down_rows: int = 0

    def reset(self):
        self.__init__()


class FakeDecoder:
    """Counts two neurons a token, and keeps (tokens in the cache before, new tokens, prompt_end)."""

    def __init__(self):
        self.config = CONFIG
        self.counters = Counters()
        self.calls = []
        self.seen = []

    def forward(self, tokens, cache, *, prompt_end=0):
        assert tokens.dtype == torch.int64
        self.calls.append((cache.length, len(tokens), prompt_end))
        self.seen += tokens.tolist()
        cache.length += len(tokens)
        counters = self.counters
        counters.kernel_s += 1e-9
        counters.active_neurons += 2 * len(tokens)
        counters.gate_rows += 6 * len(tokens)
        counters.up_rows += 2 * len(tokens)
        counters.down_rows += len(tokens)
        return torch.zeros(1, 11)


def run(test, repetitions=2, *, warms_up=True):
    decoder, cache = FakeDecoder(), KvCache(CONFIG, test.num_positions, "f32")
    result = measure(decoder, cache, test, repetitions=repetitions, warms_up=warms_up)
    return decoder, cache, result


def test_a_decode_is_single_tokens_after_the_depth():
    decoder, cache, result = run(SpeedTest(0, 3, 5))
    depth, warm = (0, 5, 5), (5, 1, 0)
    assert decoder.calls == [depth, warm, *[(5, 1, 0), (6, 1, 0), (7, 1, 0)] * 2]
    assert cache.length == 5
    assert len(result.samples) == 2
    assert set(decoder.seen) <= set(range(11))


def test_a_prompt_goes_in_batches_that_know_its_end():
    length = 2 * PREFILL_BATCH + 7
    decoder, _, _ = run(SpeedTest(length, 0, 0), repetitions=1, warms_up=False)
    assert decoder.calls == [
        (0, PREFILL_BATCH, length), (PREFILL_BATCH, PREFILL_BATCH, length), (2 * PREFILL_BATCH, 7, length)
    ]  # fmt: skip


def test_without_warm_up_nothing_runs_before_the_first_repetition():
    decoder, _, _ = run(SpeedTest(4, 2, 0), repetitions=1, warms_up=False)
    assert decoder.calls == [(0, 4, 4), (4, 1, 0), (5, 1, 0)]


def test_counts_are_of_the_timed_tokens_alone():
    _, _, result = run(SpeedTest(0, 4, 9), repetitions=3)
    assert [sample.active_neurons for sample in result.samples] == [8, 8, 8]
    assert result.per_token("gate_rows") == 6
    assert result.per_token("down_rows") == 1
    assert 0 < result.overhead < 1


def test_speeds_are_tokens_over_seconds():
    samples = tuple(Sample(seconds, seconds * 0.9, 1, 1, 1, 1) for seconds in (1.0, 2.0))
    result = Measurement(SpeedTest(0, 10, 0), samples)
    assert result.speeds == [10.0, 5.0]
    assert result.mean_speed == 7.5
    assert result.overhead == pytest.approx(0.1)
    assert deviation(result.speeds) == pytest.approx(3.5355, rel=1e-4)
    assert deviation([4.0]) == 0.0


@pytest.mark.parametrize(
    ("test", "label", "mean_length"),
    [
        (SpeedTest(512, 0, 0), "pp512", None),
        (SpeedTest(0, 128, 0), "tg128", 64.5),
        (SpeedTest(0, 128, 4096), "tg128 @ d4096", 4160.5),
        (SpeedTest(512, 128, 16), "pp512+tg128 @ d16", None),
    ],
    ids=lambda value: value.label if isinstance(value, SpeedTest) else "",
)
def test_labels_are_llama_benchs(test, label, mean_length):
    assert test.label == label
    assert test.is_decode == (mean_length is not None)
    if mean_length is not None:
        assert test.mean_length == mean_length
