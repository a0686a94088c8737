"""A sequence computes what is new and nothing else; a generation ends for the reason that it reports."""

import dataclasses
import math

import pytest
import torch

from hybrid_kernels.team import WorkerGoneError
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.config import RopeConfig
from hybrid_runtime.errors import ContextOverflow, NumericsError, UsageError, WorkerError
from hybrid_runtime.families.raw_config import RawConfig
from hybrid_runtime.families.registry import parse_config
from hybrid_runtime.generation.sampling import SamplingParams
from hybrid_runtime.generation.sequence import Generation, TokenSequence
from hybrid_runtime.model.kv_cache import KvCache

from ..small_models import EOS, LLAMA, ScriptedDecoder  # noqa: TID252  # absolute names are the runtime's

GREEDY = SamplingParams(temperature=0)
CONFIG = parse_config(RawConfig(LLAMA, "config.json"))


def sequence_of(script, *, num_positions=64, config=CONFIG):
    return TokenSequence(ScriptedDecoder(config, script), KvCache(config, num_positions, "f32"))


def generation_of(sequence, prompt=(7,), params=GREEDY, end_ids=(EOS,), num_token_ids=None):
    return Generation(sequence, prompt, params, end_ids, num_token_ids)


@pytest.mark.parametrize("length", [1, PREFILL_BATCH - 1, PREFILL_BATCH, PREFILL_BATCH + 1, 2 * PREFILL_BATCH + 3])
def test_prefill_computes_each_token_once_in_batches(length):
    sequence = sequence_of([9] * length, num_positions=3 * PREFILL_BATCH)
    logits, cached = sequence.prefill(range(10, 10 + length) if length < 100 else [10] * length)
    assert (int(logits.argmax()), cached, sequence.cache.length) == (9, 0, length)
    assert sum(sequence.decoder.batches) == length
    assert max(sequence.decoder.batches) <= PREFILL_BATCH
    assert len(sequence.decoder.batches) == math.ceil(length / PREFILL_BATCH)


@pytest.mark.parametrize(
    ("second", "cached"),
    [([1, 2, 3, 4, 5], 4), ([1, 2, 9], 2), ([9, 2, 3], 0), ([1, 2, 3, 4], 3), ([1, 2, 3], 2), ([1], 0)],
    ids=["longer", "branching", "foreign", "same", "shorter", "one"],
)
def test_second_prompt_computes_only_what_it_does_not_share(second, cached):
    sequence = sequence_of([9] * 10)
    sequence.prefill([1, 2, 3, 4])
    sequence.decoder.batches.clear()
    assert sequence.prefill(second)[1] == cached
    assert sequence.decoder.batches == [len(second) - cached]  # never none: the last token's logits are needed
    assert sequence.tokens == second


def test_prompt_that_continues_the_answer_finds_the_answer_cached():
    sequence = sequence_of([9, 8, 7, 6, 5])
    assert list(generation_of(sequence, [4], SamplingParams(temperature=0, max_tokens=3))) == [9, 8, 7]
    generation = generation_of(sequence, [4, 9, 8, 7, 3], SamplingParams(temperature=0, max_tokens=1))
    list(generation)
    assert generation.report.cached_tokens == 3  # the token that was drawn last was never computed


def test_longrope_prompts_beyond_the_trained_length_share_nothing():
    factors = (1.0,) * (CONFIG.head_dim // 2)
    rope = RopeConfig(1e4, "longrope", original_max_position_embeddings=4, short_factor=factors, long_factor=factors)
    sequence = sequence_of([9] * 20, config=dataclasses.replace(CONFIG, rope=rope))
    sequence.prefill([1, 2, 3])
    assert sequence.prefill([1, 2, 3, 4])[1] == 3  # both short
    assert sequence.prefill([1, 2, 3, 4, 5, 6])[1] == 0  # short keys, long prompt
    assert sequence.prefill([1, 2, 3])[1] == 0  # long keys, short prompt
    assert sequence.prefill([1, 2, 4])[1] == 2


@pytest.mark.parametrize(
    ("script", "params", "num_positions", "tokens", "reason"),
    [
        ([9, 8, EOS], GREEDY, 64, [9, 8], "end"),
        ([EOS], GREEDY, 64, [], "end"),
        ([9, 8, 7], SamplingParams(temperature=0, max_tokens=2), 64, [9, 8], "length"),
        ([9, 8, EOS], SamplingParams(temperature=0, max_tokens=2), 64, [9, 8], "length"),
        ([9, 8, 7, 6], GREEDY, 3, [9, 8, 7], "context"),
        ([9, 8, 7, 6], GREEDY, 1, [9], "context"),
    ],
    ids=["end", "end-at-once", "length", "length-before-end", "context", "context-of-one"],
)
def test_generation_ends_for_the_reason_it_reports(script, params, num_positions, tokens, reason):
    generation = generation_of(sequence_of(script, num_positions=num_positions), params=params)
    assert list(generation) == tokens
    assert generation.report.finish_reason == reason
    assert generation.report.generated_tokens == len(tokens) + (reason == "end")


def test_generation_that_is_left_reports_cancelled_and_the_sequence_goes_on():
    sequence = sequence_of([9, 8, 7, 6])
    generation = generation_of(sequence)
    tokens = iter(generation)
    assert [next(tokens), next(tokens)] == [9, 8]
    tokens.close()
    assert generation.report.finish_reason == "cancelled"
    assert generation.report.generated_tokens == 2
    assert generation.report.decode_s > 0
    assert next(iter(generation_of(sequence))) == 9


def test_interrupt_in_the_prefill_reports_no_negative_times():
    generation = generation_of(sequence_of([KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    report = generation.report
    assert (report.finish_reason, report.generated_tokens, report.decode_s) == ("cancelled", 0, 0)
    assert report.prefill_s == report.time_to_first_token_s > 0
    assert report.decode_tokens_per_s == 0


def test_two_answers_at_a_time_are_refused_before_they_mix():
    sequence = sequence_of([9, 8, 7, 6])
    first = iter(generation_of(sequence, [4]))
    next(first)
    next(iter(generation_of(sequence, [5])))
    with pytest.raises(UsageError, match="one at a time"):
        next(first)


def test_nan_is_an_error_and_not_a_token_and_leaves_nothing_cached():
    sequence = sequence_of([9, math.nan, 7])
    with pytest.raises(NumericsError, match="NaN or Inf after 2 tokens"):
        list(generation_of(sequence))
    assert (sequence.tokens, sequence.cache.length) == ([], 0)


def test_ids_without_text_are_never_drawn():
    sequence = sequence_of([CONFIG.vocab_size - 1] * 4)
    params = SamplingParams(temperature=0, max_tokens=3)
    assert CONFIG.vocab_size - 1 not in list(
        generation_of(sequence, params=params, num_token_ids=CONFIG.vocab_size - 1)
    )
    assert CONFIG.vocab_size - 1 in list(generation_of(sequence, params=params))


def test_repetition_penalty_sees_the_prompt_and_the_answer():
    class Flat(ScriptedDecoder):
        def forward(self, tokens, cache, **options):
            logits = super().forward(tokens, cache, **options)
            return torch.where(torch.arange(logits.shape[1]) < 4, 1.0, 0.0).expand(len(logits), -1).clone()

    sequence = TokenSequence(Flat(CONFIG, []), KvCache(CONFIG, 64, "f32"))
    params = SamplingParams(temperature=0, max_tokens=3, repetition_penalty=2.0)
    assert list(generation_of(sequence, [0], params, end_ids=())) == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], UsageError, "no tokens"),
        ([1] * 65, ContextOverflow, "65 tokens, the context holds 64.*--ctx 321"),
        ([1, CONFIG.vocab_size], UsageError, f"token id {CONFIG.vocab_size} in the prompt"),
        ([-1], UsageError, "token id -1"),
    ],
    ids=["empty", "too-long", "unknown-id", "negative-id"],
)
def test_prompts_that_cannot_be_computed_are_refused_first(prompt, error, message):
    sequence = sequence_of([9])
    with pytest.raises(error, match=message):
        generation_of(sequence, prompt)
    assert sequence.decoder.batches == []


def test_scores_are_the_same_in_batches():
    script = [5 + idx % 7 for idx in range(PREFILL_BATCH + 9)]
    sequence = sequence_of(script, num_positions=2 * PREFILL_BATCH)
    rows = list(sequence.score([3] * len(script)))
    assert [len(row) for row in rows] == [PREFILL_BATCH, 9]
    assert torch.cat(rows).argmax(dim=1).tolist() == script


@pytest.mark.parametrize(("length", "batches"), [(1, [1]), (6, [1] * 6), (7, [7])])
def test_short_prompts_go_one_by_one_where_that_is_quicker(length, batches):
    sequence = sequence_of([9] * length)
    sequence.decoder.most_tokens_one_by_one = 6
    logits, _ = sequence.prefill([10] * length)
    assert sequence.decoder.batches == batches
    assert int(logits.argmax()) == 9


def test_a_worker_that_is_gone_is_an_error_of_the_tree(monkeypatch):
    sequence = sequence_of([9])

    def forward(*arguments, **options):
        raise WorkerGoneError("a worker thread has ended")

    monkeypatch.setattr(sequence.decoder, "forward", forward)
    with pytest.raises(WorkerError, match="a worker thread has ended"):
        sequence.step(3)
