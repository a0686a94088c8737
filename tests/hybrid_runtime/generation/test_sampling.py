"""The choice of a token: against a plain numpy oracle, against transformers' warpers, and by counting what is drawn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hybrid_runtime.errors import NumericsError, UsageError
from hybrid_runtime.generation.sampling import MAX_SEED, Sampler, SamplingParams, next_token_distribution

logits_that_exp_tells_apart = st.floats(-30, 30, width=32).map(lambda value: round(value, 5))
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def random_logits(num_tokens: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(seed)) * scale


def distribution(logits: torch.Tensor, params: SamplingParams, recent=()) -> dict[int, float]:
    ids, probabilities = next_token_distribution(logits, params, recent)
    assert ids.dtype == torch.int64
    assert probabilities.dtype == torch.float64
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), probabilities.tolist(), strict=True))


def oracle(logits: list[float], params: SamplingParams, recent=()) -> tuple[dict[int, float], float]:
    """The module's six steps said in loops over a sorted list; also how near any decision came to falling otherwise."""
    logits = [float(value) for value in logits]
    for token in set(recent[max(0, len(recent) - params.repetition_window) :]):
        penalty = params.repetition_penalty
        logits[token] = float(np.float32(logits[token] / penalty if logits[token] > 0 else logits[token] * penalty))
    ranked = sorted((i for i, value in enumerate(logits) if value > -math.inf), key=lambda i: (-logits[i], i))
    kept = ranked[: params.top_k] if params.top_k else ranked
    margin = math.inf
    odds = np.exp(np.array([logits[i] for i in kept]) - logits[kept[0]])
    if params.top_p < 1:
        probabilities = odds / odds.sum()
        mass, num_kept = 0.0, 0
        while num_kept < len(kept) and mass < params.top_p:
            mass += probabilities[num_kept]
            num_kept += 1
            margin = min(margin, abs(mass - params.top_p))
        kept, odds = kept[:num_kept], odds[:num_kept]
    margin = min(margin, *(abs(ratio - params.min_p) for ratio in odds))
    kept = [i for i, ratio in zip(kept, odds, strict=True) if ratio >= params.min_p]
    scaled = np.exp((np.array([logits[i] for i in kept]) - logits[kept[0]]) / params.temperature)
    return dict(zip(kept, (scaled / scaled.sum()).tolist(), strict=True)), margin


def assert_same(found: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert sorted(found) == sorted(expected)
    for token, probability in expected.items():
        assert found[token] == pytest.approx(probability, abs=tolerance)


@pytest.mark.parametrize("num_tokens", [1, 2, 39, 40, 41, 333, 32003], ids=lambda n: f"V{n}")
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        OFF,
        OFF | {"temperature": 0.3},
        OFF | {"temperature": 7.5},
        OFF | {"top_k": 1},
        OFF | {"top_k": 7},
        OFF | {"top_k": 10**30},
        OFF | {"top_p": 0.5},
        OFF | {"top_p": 1e-300},
        OFF | {"top_p": 1 - 2**-53},
        OFF | {"min_p": 0.2},
        OFF | {"min_p": 1.0},
        OFF | {"min_p": 0.02, "top_p": 0.97},
        OFF | {"top_k": 5, "top_p": 0.6, "temperature": 1.7},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6, "repetition_window": 3},
        {"repetition_penalty": 1.3, "repetition_window": 0},
    ],
    ids=lambda chosen: "-".join(f"{key}{value:.3g}" for key, value in chosen.items()) or "defaults",
)
def test_distribution_equals_the_numpy_oracle(num_tokens, chosen):
    params = SamplingParams(**chosen)
    logits = random_logits(num_tokens, seed=num_tokens)
    top = logits.topk(min(8, num_tokens)).indices.tolist()
    recent = [*top, *top[:2], num_tokens - 1, 0]
    expected, _ = oracle(logits.tolist(), params, recent)
    assert_same(distribution(logits, params, recent), expected, tolerance=1e-9)


@settings(max_examples=300, deadline=None)
@given(
    logits=st.lists(
        st.one_of(st.integers(-4, 4).map(float), logits_that_exp_tells_apart, st.just(-math.inf)),
        min_size=1,
        max_size=60,
    ),
    recent=st.lists(st.integers(0, 59), max_size=12),
    temperature=st.floats(1e-2, 1e3),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.1, 10),
    repetition_window=st.integers(0, 14),
)
def test_distribution_equals_the_numpy_oracle_for_any_parameters(logits, recent, **chosen):
    assume(max(logits) > -math.inf)
    params = SamplingParams(**chosen)
    recent = [token for token in recent if token < len(logits)]
    expected, margin = oracle(logits, params, recent)
    assume(margin > 1e-12)  # where a sum meets the threshold exactly, rounding decides; exact cases are tested below
    found = distribution(torch.tensor(logits, dtype=torch.float32), params, recent)
    assert_same(found, expected, tolerance=1e-9)


def transformers_probabilities(logits: torch.Tensor, params: SamplingParams, recent: list[int]) -> torch.Tensor:
    warpers = LogitsProcessorList()
    if recent and params.repetition_penalty != 1:
        warpers.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        recent = recent[-params.repetition_window :]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    return warpers(torch.tensor([recent]), logits.double()[None].clone())[0].softmax(0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_tokens", [50, 1009], ids=lambda n: f"V{n}")
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        OFF | {"temperature": 0.4},
        OFF | {"top_k": 11},
        OFF | {"top_p": 0.8},
        OFF | {"min_p": 0.1},
        OFF | {"repetition_penalty": 1.4, "repetition_window": 10},
        {"repetition_penalty": 0.7, "temperature": 1.6, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda chosen: "-".join(chosen) or "defaults",
)
def test_distribution_equals_transformers_warpers_in_this_order(seed, num_tokens, chosen):
    params = SamplingParams(**chosen)
    logits = random_logits(num_tokens, seed)
    recent = torch.randint(num_tokens, (25,), generator=torch.Generator().manual_seed(seed)).tolist()
    expected = transformers_probabilities(logits, params, recent)
    found = torch.zeros(num_tokens, dtype=torch.float64)
    ids, probabilities = next_token_distribution(logits, params, recent)
    found[ids] = probabilities
    # both in float64; ours rounds the penalised logits to float32, a relative 6e-8 of logits up to 15
    torch.testing.assert_close(found, expected, rtol=5e-6, atol=1e-12)


def chi_square(counts: dict[int, int], probabilities: dict[int, float], num_draws: int) -> float:
    assert set(counts) <= set(probabilities), "a token was drawn that has no probability"
    return sum((counts.get(i, 0) - num_draws * p) ** 2 / (num_draws * p) for i, p in probabilities.items())


@pytest.mark.parametrize("chosen", [{}, OFF, {"temperature": 2.0, "min_p": 0.0}], ids=["defaults", "off", "hot"])
def test_drawn_frequencies_follow_the_distribution(chosen):
    logits = random_logits(12, seed=5, scale=1.2)
    num_draws = 6000
    sampler = Sampler(SamplingParams(**chosen, seed=11))
    counts: dict[int, int] = {}
    for _ in range(num_draws):
        token = sampler.sample(logits, [])
        counts[token] = counts.get(token, 0) + 1
    expected, _ = oracle(logits.tolist(), SamplingParams(**chosen))
    freedom = len(expected) - 1
    limit = freedom + 4 * math.sqrt(2 * freedom)  # four deviations of the chi-square distribution
    assert chi_square(counts, expected, num_draws) < limit
    # the same draws must not pass for another temperature, or the test could not tell
    other, _ = oracle(logits.tolist(), SamplingParams(**(chosen | {"temperature": 1.25})))
    assert chi_square(counts, other, num_draws) > limit


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((200,), -math.inf)
    logits[[3, 77, 199]] = torch.tensor([0.5, -2.0, 0.1])
    for chosen in ({}, OFF, OFF | {"top_k": 5}, OFF | {"temperature": 1e308}, OFF | {"top_p": 0.999}):
        sampler = Sampler(SamplingParams(**chosen, seed=1))
        drawn = {sampler.sample(logits, []) for _ in range(200)}
        assert drawn == {3, 77, 199} if chosen else drawn <= {3, 77, 199}


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (1 - 2**-53, 2)], ids=["lowest", "highest"])
def test_the_ends_of_the_uniform_draw_pick_tokens_that_have_a_probability(monkeypatch, uniform, token):
    logits = torch.tensor([-9.0, 1.0, 1.0, -9.0])  # at this temperature the outer two have probability 0
    monkeypatch.setattr(torch, "rand", lambda *_, **kwargs: torch.tensor(uniform, dtype=kwargs["dtype"]))
    assert Sampler(SamplingParams(**(OFF | {"temperature": 1e-3}))).sample(logits, []) == token


def test_temperature_zero_takes_the_highest_logit():
    logits = random_logits(5000, seed=3)
    best = int(np.argmax(logits.numpy()))
    assert Sampler(SamplingParams(temperature=0)).sample(logits, []) == best
    assert distribution(logits, SamplingParams(temperature=0)) == {best: 1.0}


@pytest.mark.parametrize("num_tokens", [2, 33, 40000], ids=lambda n: f"V{n}")
def test_temperature_zero_takes_the_lowest_id_of_a_tie(num_tokens):
    logits = torch.zeros(num_tokens)
    assert Sampler(SamplingParams(temperature=0)).sample(logits, []) == 0
    logits[[num_tokens // 2, num_tokens - 1]] = 7.0
    assert Sampler(SamplingParams(temperature=0)).sample(logits, []) == num_tokens // 2


def test_temperature_zero_obeys_the_repetition_penalty():
    logits = torch.tensor([3.0, 2.9, -1.0])
    assert Sampler(SamplingParams(temperature=0, repetition_penalty=1.2)).sample(logits, [0]) == 1


def test_top_k_keeps_exactly_k_and_the_lowest_ids_of_a_tie():
    logits = torch.tensor([1.0, 2.0, 1.0, 5.0, 1.0, 2.0, 1.0])
    assert sorted(distribution(logits, SamplingParams(**(OFF | {"top_k": 4})))) == [0, 1, 3, 5]
    assert sorted(distribution(logits, SamplingParams(**(OFF | {"top_k": 5})))) == [0, 1, 2, 3, 5]
    assert sorted(distribution(torch.zeros(50000), SamplingParams(**(OFF | {"top_k": 3})))) == [0, 1, 2]


def test_top_p_stops_at_the_token_that_reaches_p_exactly():
    assert sorted(distribution(torch.zeros(4), SamplingParams(**(OFF | {"top_p": 0.5})))) == [0, 1]
    assert sorted(distribution(torch.zeros(4), SamplingParams(**(OFF | {"top_p": 0.51})))) == [0, 1, 2]
    assert sorted(distribution(torch.zeros(50000), SamplingParams(**(OFF | {"top_p": 1e-4})))) == [0, 1, 2, 3, 4]


def test_top_p_is_renormalised_after_top_k():
    # three of eight equal tokens hold 3/8 of all, yet 3/4 of the four that top-k leaves
    assert sorted(distribution(torch.zeros(8), SamplingParams(**(OFF | {"top_k": 4, "top_p": 0.7})))) == [0, 1, 2]


def test_top_p_counts_the_mass_that_min_p_removes():
    logits = torch.tensor([0.4, *[0.1] * 3, *[0.01] * 30]).log()
    assert sorted(distribution(logits, SamplingParams(**(OFF | {"min_p": 0.2})))) == [0, 1, 2, 3]
    # of what min-p leaves, 0.7, token 0 alone would hold more than 0.55
    assert sorted(distribution(logits, SamplingParams(**(OFF | {"top_p": 0.55, "min_p": 0.2})))) == [0, 1, 2]


def test_min_p_keeps_the_token_that_is_exactly_min_p_times_the_best():
    logits = torch.tensor([0.0, -math.inf, 0.0, -3.0])
    assert sorted(distribution(logits, SamplingParams(**(OFF | {"min_p": 1.0})))) == [0, 2]


def test_repetition_penalty_counts_a_token_once_and_only_inside_the_window():
    logits = torch.tensor([2.0, -2.0, 0.0, 1.0])
    params = SamplingParams(**OFF, repetition_penalty=2.0, repetition_window=3)
    expected = torch.tensor([1.0, -4.0, 0.0, 1.0], dtype=torch.float64).softmax(0)
    found = distribution(logits, params, recent=[3, 3, 0, 1, 0])
    assert [found[i] for i in range(4)] == pytest.approx(expected.tolist(), abs=1e-7)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_draws_only_the_best(temperature):
    logits = random_logits(100, seed=8)
    sampler = Sampler(SamplingParams(**(OFF | {"temperature": temperature}), seed=0))
    assert {sampler.sample(logits, []) for _ in range(50)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e308, 10**300], ids=["1e308", "integer"])
def test_a_huge_temperature_makes_the_survivors_equally_probable(temperature):
    found = distribution(random_logits(100, seed=8), SamplingParams(temperature=temperature, top_k=7, min_p=0, top_p=1))
    assert list(found.values()) == pytest.approx([1 / 7] * 7)


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e308], ids=str)
def test_extreme_penalties_and_logits_stay_finite(penalty):
    limit = torch.finfo(torch.float32).max
    logits = torch.tensor([0.0, limit, -limit, -math.inf, 1.0])
    found = distribution(logits, SamplingParams(**OFF, repetition_penalty=penalty), recent=[0, 1, 2, 3])
    assert all(math.isfinite(probability) for probability in found.values())
    assert 3 not in found
    assert sum(found.values()) == pytest.approx(1)


def test_equal_seeds_give_equal_tokens_and_other_seeds_others():
    rows = [random_logits(500, seed=i, scale=0.5) for i in range(40)]

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(**OFF, seed=seed))
        return [sampler.sample(row, []) for row in rows]

    torch.manual_seed(1)
    first = draw(42)
    torch.manual_seed(2)  # torch's own generator has no say
    assert draw(42) == first
    assert draw(43) != first
    assert len(draw(MAX_SEED)) == 40


def test_the_seed_of_an_unseeded_sampler_repeats_its_tokens():
    row = random_logits(5000, seed=0, scale=0.1)
    unseeded, other = Sampler(SamplingParams(**OFF)), Sampler(SamplingParams(**OFF))
    drawn = [unseeded.sample(row, []) for _ in range(20)]
    again = Sampler(SamplingParams(**OFF, seed=unseeded.seed))
    assert [again.sample(row, []) for _ in range(20)] == drawn
    assert unseeded.seed != other.seed


def test_sampling_changes_neither_logits_nor_the_global_generator():
    logits = random_logits(64, seed=1)
    before, state = logits.clone(), torch.get_rng_state()
    Sampler(SamplingParams(repetition_penalty=1.5, seed=3)).sample(logits, [1, 2])
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_bfloat16_logits_with_a_gradient_are_taken_too():
    logits = random_logits(64, seed=1).bfloat16().requires_grad_()
    assert Sampler(SamplingParams(temperature=0)).sample(logits, []) == int(logits.float().argmax())


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("logits", "named"),
    [
        ([1.0, math.nan, 2.0], "NaN"),
        ([math.nan, math.inf], "NaN"),
        ([1.0, math.inf], r"\+inf"),
        ([-math.inf, -math.inf], "-inf in every place"),
    ],
    ids=["nan", "nan-and-inf", "inf", "all-forbidden"],
)
def test_logits_without_a_sound_maximum_are_a_numerics_error(temperature, logits, named):
    with pytest.raises(NumericsError, match=named):
        Sampler(SamplingParams(temperature=temperature)).sample(torch.tensor(logits), [])


@pytest.mark.parametrize("shape", [(0,), (1, 5), ()], ids=str)
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(UsageError, match=r"shape \[V\]"):
        Sampler(SamplingParams()).sample(torch.zeros(shape), [])


@pytest.mark.parametrize("token", [-1, 4, 2**40])
def test_recent_ids_outside_the_vocabulary_are_refused(token):
    with pytest.raises(UsageError, match=rf"recent: expected token ids in 0\.\.3, found {token}"):
        Sampler(SamplingParams(repetition_penalty=1.1)).sample(torch.zeros(4), [0, token])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, value) for field in ("temperature", "top_p", "min_p", "repetition_penalty") for value in
          (math.nan, math.inf, -math.inf, -1, -1e-300, True, False, "0.5", None, 10**400, [1])],
        ("top_p", 0),
        ("top_p", 1.0000001),
        ("min_p", 1.0000001),
        ("repetition_penalty", 0),
        *[(field, value) for field in ("top_k", "repetition_window", "seed", "max_tokens") for value in
          (-1, 0.5, 1.0, math.nan, True, "1", -(10**5000))],
        ("top_k", None),
        ("repetition_window", None),
        ("seed", 2**63),
        ("max_tokens", 0),
    ],
    ids=lambda value: str(value) if not isinstance(value, int) or abs(value) < 10**30 else "huge",
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}: expected a")
    assert ("more than 256 bits" if isinstance(value, int) and abs(value) > 2**256 else repr(value)) in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("stop", "named"),
    [
        ("END", "expected a tuple of strings, found a str"),
        (["END"], "expected a tuple of strings, found a list"),
        (("a", ""), r"stop\[1\]: expected at least one character"),
        (("a", 5), r"stop\[1\]: expected a string, found a int"),
        (("x",) * 65, "at most 64 strings, found 65"),
        (("x",) * 10_000, "at most 64 strings, found 10000"),
    ],
    ids=["bare", "list", "empty", "number", "65", "10000"],
)
def test_unusable_stop_strings_are_refused(stop, named):
    with pytest.raises(UsageError, match=named):
        SamplingParams(stop=stop)


def test_the_ends_of_every_range_are_accepted():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=5e-324, repetition_window=0, seed=0)
    SamplingParams(
        temperature=1e308, top_p=5e-324, min_p=1, seed=2**63 - 1, max_tokens=1, top_k=10**9, stop=("x",) * 64
    )
