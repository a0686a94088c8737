"""Every family that transformers implements, its neurons spread over tiers: logits are still transformers'."""

import pytest

from ..model.test_transformers_families import make_pair  # noqa: TID252
from ..model.tiny_models import TOLERANCE  # noqa: TID252
from ..model.transformers_models import CASES  # noqa: TID252
from .tiered_models import spread


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_theirs_wherever_neurons_are(case, tmp_path):
    pair = make_pair(case, tmp_path)
    for seed in (1, 2):
        assert pair.difference(weights=spread(pair.loaded.store, seed)) <= TOLERANCE
