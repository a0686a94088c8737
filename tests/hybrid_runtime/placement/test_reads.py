"""How often rows are read, against numbers worked out by hand, and against what decoding counts."""

import pytest
import torch

from hybrid_kernels.activation import Activation
from hybrid_runtime.placement.reads import Reading, expected_reads, expected_rows, total_rows
from hybrid_runtime.profiling.profile import LayerCounts, Profile, TextDigest

from .made_up import DIGEST, config_of, mixture_of

NOTHING = torch.zeros(0, 0, dtype=torch.int64)
DENSE = config_of(intermediate_size=4, num_hidden_layers=1)
MIXTURE = mixture_of(intermediate_size=2, num_hidden_layers=1, num_experts=2, num_experts_per_tok=1)


def profile_of(fired, tokens, num_tokens=100):
    """One layer's counts."""
    counts = LayerCounts(torch.tensor(fired), torch.tensor(tokens), torch.zeros(len(tokens)).long(), NOTHING, NOTHING)
    texts = (TextDigest("a" * 64, num_tokens),)
    return Profile("m", DIGEST, texts, 8, torch.zeros(0).long(), (counts,), torch.zeros(0, 8).int())


FOUR = profile_of([[50, 20, 10, 0]], [100])
# of 100 tokens 80 go to expert 0; what is in the second row fires for 15 and 20 of expert 1's 20
TWO = profile_of([[40, 8], [15, 20]], [80, 20])


def check(profile, config, reading, reads, rows):
    (found,) = expected_reads(profile, config, reading)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(reads, dtype=torch.float64))
    totals = total_rows(expected_rows(profile, config, reading))
    assert (totals.gate, totals.up, totals.down) == pytest.approx(rows)


def test_every_gate_is_read_without_a_predictor():
    reads = [[(1 + 0.5 + 0.5) / 3, (1 + 0.2 + 0.2) / 3, (1 + 0.1 + 0.1) / 3, 1 / 3]]
    check(FOUR, DENSE, Reading(None, 1.0), reads, (4, 0.8, 0.8))


def test_gates_that_fire_in_vain_read_their_up_rows():
    # three gates fire for a neuron that does, though never more often than there are tokens
    reads = [[(1 + 1 + 0.5) / 3, (1 + 0.6 + 0.2) / 3, (1 + 0.3 + 0.1) / 3, 1 / 3]]
    check(FOUR, DENSE, Reading(None, 3.0), reads, (4, 1.9, 0.8))


def test_a_predictor_spares_the_gates_of_neurons_that_it_does_not_name():
    # three named for one that fires, of which two gates fire
    reads = [[(1 + 1 + 0.5) / 3, (0.6 + 0.4 + 0.2) / 3, (0.3 + 0.2 + 0.1) / 3, 0]]
    check(FOUR, DENSE, Reading(3.0, 2.0), reads, (1.9, 1.6, 0.8))


def test_what_a_predictor_does_not_name_is_not_read_though_it_would_fire():
    reads = [[0.25, 0.1, 0.05, 0]]
    check(FOUR, DENSE, Reading(0.5, 1.0), reads, (0.4, 0.4, 0.4))


def test_all_rows_of_the_experts_that_tokens_go_to_are_read_where_nothing_is_left_out():
    check(FOUR, DENSE, Reading(None, 3.0, every_row=True), [[1.0] * 4], (4, 4, 4))
    check(TWO, MIXTURE, Reading(2.0, 1.0, every_row=True), [[0.8, 0.8], [0.2, 0.2]], (2, 2, 2))
    config = config_of(intermediate_size=4, num_hidden_layers=1, activation=Activation("relu"))
    check(FOUR, config, Reading(None, 1.0, every_row=True), [[1.0] * 4], (0, 4, 4))


def test_rows_come_by_layer():
    two = Profile(FOUR.model, DIGEST, FOUR.texts, 8, FOUR.watched, FOUR.layers * 2, FOUR.held_out)
    rows = expected_rows(two, config_of(intermediate_size=4, num_hidden_layers=2), Reading(None, 1.0))
    assert [each.gate for each in rows] == [4, 4]
    assert total_rows(rows).gate == 8


def test_without_a_gate_all_up_rows_are_read():
    config = config_of(intermediate_size=4, num_hidden_layers=1, activation=Activation("relu"))
    check(FOUR, config, Reading(None, 1.0), [[0.75, 0.6, 0.55, 0.5]], (0, 4, 0.8))
    check(FOUR, config, Reading(2.0, 1.0), [[0.75, 0.3, 0.15, 0]], (0, 1.6, 0.8))


def test_experts_read_only_for_tokens_that_come():
    reads = [[(0.8 + 0.4 + 0.4) / 3, (0.8 + 0.08 + 0.08) / 3], [(0.2 + 0.15 + 0.15) / 3, 0.2]]
    check(TWO, MIXTURE, Reading(None, 1.0), reads, (2.0, 0.83, 0.83))
    reads = [[(0.8 + 0.4 + 0.4) / 3, (0.16 + 0.08 + 0.08) / 3], [(0.2 + 0.15 + 0.15) / 3, 0.2]]
    check(TWO, MIXTURE, Reading(2.0, 1.0), reads, (1.36, 0.83, 0.83))


def test_an_empty_profile_reads_nothing():
    check(profile_of([[0, 0, 0, 0]], [0], 0), DENSE, Reading(None, 1.0), [[0.0] * 4], (0, 0, 0))
