"""Both protocols against the same sums written down once more, in plain torch, window by window."""

import math

import pytest
import torch

from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.engine import Engine
from hybrid_runtime.errors import ContextOverflow, NumericsError, UsageError
from hybrid_runtime.evaluation.perplexity import measure_perplexity
from hybrid_runtime.load_options import LoadOptions

from ..model.conftest import one_thread  # noqa: F401, TID252  # a fixture
from ..small_models import BOS, ScriptedDecoder, write_model  # noqa: TID252  # absolute names are the runtime's

TEXT = "Hello world, once and the other and a thing. " * 20  # 320 tokens


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    options = LoadOptions(cache_dir=folder / "cache", num_positions=2 * PREFILL_BATCH, scores=True)
    return {
        add_bos: Engine.load(str(write_model(folder / f"bos-{add_bos}", add_bos=add_bos)), options)
        for add_bos in (True, False)
    }


def losses_of(engine, tokens):
    """-log p(token | all before it) of every token but the first."""
    odds = torch.log_softmax(engine.logits(tokens[:-1]).double(), dim=-1)
    return [-odds[idx, token].item() for idx, token in enumerate(tokens[1:])]


def full_by_hand(engine, tokens, window):
    """Each window reads `window` tokens and predicts the one that follows each of them."""
    windows = [tokens[start : start + window + 1] for start in range(0, len(tokens), window)]
    return [loss for each in windows if len(each) > 1 for loss in losses_of(engine, each)]


def half_by_hand(engine, tokens, window):
    """llama.cpp's perplexity(): logits at positions window / 2 ... window - 2 predict the tokens after them."""
    scored = []
    for start in range(0, len(tokens) // window * window, window):
        each = tokens[start : start + window]
        if engine.tokenizer.add_bos:
            each = [BOS, *each[1:]]
        odds = torch.log_softmax(engine.logits(each).double(), dim=-1)
        scored += [-odds[position, each[position + 1]].item() for position in range(window // 2, window - 1)]
    return scored


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("window", [4, 5, 32, 33, 300])
@pytest.mark.parametrize(("protocol", "by_hand"), [("full", full_by_hand), ("half", half_by_hand)])
def test_perplexity_is_the_sum_written_down(engines, protocol, by_hand, window, add_bos):
    engine = engines[add_bos]
    tokens = engine.tokenizer.encode(TEXT)
    losses = by_hand(engine, tokens, window)
    result = measure_perplexity(engine, TEXT, protocol, window)
    assert result.num_scored == len(losses)
    assert result.mean_loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)  # float32 logits in other batches
    assert result.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    deviation = torch.tensor(losses).std(correction=1).item()
    assert result.standard_error == pytest.approx(result.value * deviation / math.sqrt(len(losses)), rel=1e-3)


def test_half_scores_255_of_512_as_llama_cpp_does(engines):
    result = measure_perplexity(engines[True], TEXT * 2, "half", 512)
    assert (result.num_windows, result.num_scored) == (1, 255)


def test_full_scores_every_token_of_the_text(engines):
    tokens = engines[True].tokenizer.encode(TEXT)
    result = measure_perplexity(engines[True], TEXT, "full", 60)
    assert tokens[0] == BOS
    assert result.num_windows == math.ceil((len(tokens) - 1) / 60)
    assert result.num_scored == len(tokens) - 1


def test_a_text_that_ends_with_its_window_has_no_empty_one(engines):
    engine = engines[False]
    tokens = engine.tokenizer.encode("x" * 9)
    assert len(tokens) == 9
    result = measure_perplexity(engine, "x" * 9, "full", 8)
    assert (result.num_windows, result.num_scored) == (1, 8)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(engines):
    engine = engines[True]
    decoder = engine.sequence.decoder

    class Uniform(ScriptedDecoder):
        def forward(self, tokens, cache, **options):
            return torch.zeros_like(super().forward(tokens, cache, **options))

    engine.sequence.decoder = Uniform(engine.config, [])
    result = measure_perplexity(engine, TEXT, "half", 64)
    engine.sequence.decoder = decoder
    assert result.value == pytest.approx(engine.config.vocab_size, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-3)


def test_windows_are_told_as_they_are_done_and_end_where_asked(engines):
    seen = []
    result = measure_perplexity(engines[True], TEXT, "half", 32, seen.append, max_windows=3)
    assert [each.num_windows for each in seen] == [1, 2, 3]
    assert seen[-1] == result
    assert result.to_json()["perplexity"] == result.value


@pytest.mark.parametrize(
    ("text", "protocol", "window", "message"),
    [
        ("Hello", "half", 512, "has 2 tokens, protocol half needs at least 512"),
        ("", "full", 512, "has 1 tokens, protocol full needs at least 2"),
        (TEXT, "half", 3, "needs at least 4"),
        (TEXT, "full", 1, "needs at least 2"),
    ],
    ids=["short-half", "empty-full", "window-3-half", "window-1-full"],
)
def test_what_cannot_be_scored_is_refused(engines, text, protocol, window, message):
    with pytest.raises(UsageError, match=message):
        measure_perplexity(engines[True], text, protocol, window)


def test_window_beyond_the_context_is_refused(engines):
    with pytest.raises(ContextOverflow):
        measure_perplexity(engines[True], TEXT * 9, "full", 2 * PREFILL_BATCH + 2)


def test_nan_is_not_a_perplexity(engines):
    engine = engines[True]
    decoder = engine.sequence.decoder
    engine.sequence.decoder = ScriptedDecoder(engine.config, [5, math.nan])
    with pytest.raises(NumericsError):
        measure_perplexity(engine, TEXT, "full", 64)
    engine.sequence.decoder = decoder
