"""Learning rate and penalty at points that were worked out by hand."""

import pytest

from hybrid_tools.training.recipe import Optimisation
from hybrid_tools.training.schedule import l1_weight, learning_rate

RUN = Optimisation(
    total_tokens=100 * 4096, learning_rate=1.0, final_learning_rate=0.1, warmup=0.1, l1=8.0, l1_start=0.2, l1_end=0.6
)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (55, 0.55), (100, 0.1)], ids=str)
def test_learning_rate_rises_then_falls_along_half_a_cosine(step, rate):
    assert RUN.num_steps == 100
    assert learning_rate(RUN, step) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 0.0), (19, 0.0), (20, 0.0), (30, 8 * 0.14644661), (40, 4.0), (60, 8.0), (99, 8.0)]
)
def test_penalty_waits_rises_and_stays(step, weight):
    assert l1_weight(RUN, step) == pytest.approx(weight)


def test_run_without_warmup_begins_with_the_largest_rate():
    assert learning_rate(Optimisation(total_tokens=8192, warmup=0.0, learning_rate=0.5), 0) == pytest.approx(0.5)


def test_last_step_is_whole():
    assert Optimisation(total_tokens=4097).num_steps == 2
    assert Optimisation(total_tokens=1).num_steps == 1
