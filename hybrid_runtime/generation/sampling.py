"""How the next token is chosen from one position's logits.

The steps, in this order, each seeing only what the ones before it left:

1. repetition penalty: a token among the last `repetition_window` ones has its logit divided by the penalty where it
   is positive and multiplied by it where it is not, once however often it occurred (CTRL, arXiv:1909.05858 section
   4.1, as transformers' RepetitionPenaltyLogitsProcessor settles the sign).
2. top-k: the k most probable tokens (Fan et al., arXiv:1805.04833). Exactly k: the lowest ids win a tie.
3. top-p: the smallest set of most probable tokens whose probabilities, renormalised after top-k, add up to at least p;
   never empty (Holtzman et al., arXiv:1904.09751).
4. min-p: tokens at least min_p times as probable as the most probable one (Nguyen et al., arXiv:2407.01082).
5. temperature: logits are divided by it, so it shapes the odds among the survivors and not who survives.
6. one draw from the softmax of what is left.

Order and defaults are llama.cpp's (common/common.h, `common_params_sampling`); transformers applies temperature before
top-k instead, which gives other candidates whenever temperature is not 1. Temperature 0 is greedy: step 1, then
the highest logit, of equal ones the lowest id.

Everything after the logits runs on the CPU in float64, so that a seed gives the same tokens whichever device computed
them. It knows token ids, never text: `max_tokens` and `stop` travel in the parameters, the caller honours them.
"""

from __future__ import annotations

import math
import reprlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from hybrid_runtime.errors import NumericsError, UsageError
from hybrid_runtime.generation.stop import check_stop_strings

MAX_SEED: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a caller may ask of the choice of tokens; the defaults are llama.cpp's. Checks itself."""

    temperature: float = 0.8  # 0 = greedy
    top_k: int = 40  # 0 = off
    top_p: float = 0.95  # 1 = off
    min_p: float = 0.05  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off
    repetition_window: int = 64  # tokens; 0 = off
    seed: int | None = None  # None = a fresh one each time
    max_tokens: int | None = None  # None = as the context allows
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        temperature = _finite("temperature", self.temperature, "a number >= 0 (0 = greedy)")
        _require("temperature", self.temperature, temperature >= 0, "a number >= 0 (0 = greedy)")
        top_p = _finite("top_p", self.top_p, "a number in (0, 1] (1 = off)")
        _require("top_p", self.top_p, 0 < top_p <= 1, "a number in (0, 1] (1 = off)")
        min_p = _finite("min_p", self.min_p, "a number in [0, 1] (0 = off)")
        _require("min_p", self.min_p, 0 <= min_p <= 1, "a number in [0, 1] (0 = off)")
        penalty = _finite("repetition_penalty", self.repetition_penalty, "a number > 0 (1 = off)")
        _require("repetition_penalty", self.repetition_penalty, penalty > 0, "a number > 0 (1 = off)")
        _whole("top_k", self.top_k, 0, None, "an integer >= 0 (0 = off)")
        _whole("repetition_window", self.repetition_window, 0, None, "an integer >= 0 (0 = off)")
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED, "an integer in 0..2**63-1, or None for a fresh one")
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None, "an integer >= 1, or None for no limit")
        check_stop_strings(self.stop)


class Sampler:
    """Draws the tokens of one sequence; equal seeds and equal logits give equal tokens, in this run and the next."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbelow(MAX_SEED + 1) if params.seed is None else params.seed  # shown, so a run repeats
        self._generator = torch.Generator(device="cpu")
        self._generator.manual_seed(self.seed)

    def sample(self, logits: torch.Tensor, recent: Sequence[int] = ()) -> int:
        """logits: [V] float32, -inf = forbidden; recent: the ids so far, latest last -> one id. Changes neither."""
        if self.params.temperature == 0:
            return int(_penalised(_checked(logits), self.params, recent).argmax())  # argmax: first of equal ones
        ids, probabilities = next_token_distribution(logits, self.params, recent)
        cumulative = probabilities.cumsum(0)  # [N]
        uniform = torch.rand((), generator=self._generator, dtype=torch.float64)
        # uniform is at most 1 - 2**-53, so the product stays below the last entry even after rounding, and
        # right=True passes over tokens of probability 0.
        chosen = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return int(ids[chosen])


def next_token_distribution(
    logits: torch.Tensor, params: SamplingParams, recent: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Sampler.sample` draws from, for those who need the odds and not the draw.

    logits: [V] float32 -> ids [N] int64 and their probabilities [N] float64, which add up to 1. The order is fixed but
    means nothing.
    """
    logits = _penalised(_checked(logits), params, recent)
    if params.temperature == 0:
        return logits.argmax().reshape(1), torch.ones(1, dtype=torch.float64)
    ids = _surviving_ids(logits, params)
    kept = logits[ids].double()  # [N]
    # Subtracting the maximum first keeps 0 / temperature = 0 for the best token, however small the temperature is.
    weights = torch.exp((kept - kept.max()) / float(params.temperature))
    return ids, weights / weights.sum()


def _surviving_ids(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Token ids that top-k, top-p and min-p leave: [V] -> [N] int64.

    Sorting 152k logits takes 16 ms on two EPYC cores, all else 2 ms. So min-p, which needs no order, goes first here,
    and top-p sorts only its survivors: both keep a run of the most probable tokens, and top-p still counts the mass
    that min-p removed.
    """
    ids = _most_probable_ids(logits, params.top_k)
    kept = logits[ids]
    ratios = torch.exp(kept.double() - kept.max())  # [N] probability relative to the most probable token
    total = ratios.sum()
    if params.min_p > 0:
        above = ratios >= params.min_p
        ids, ratios = ids[above], ratios[above]
    if params.top_p < 1:
        # stable: of equally probable tokens the lowest id comes first, since ids ascend among equal ones
        ratios, order = ratios.sort(descending=True, stable=True)
        last = torch.searchsorted(ratios.cumsum(0), params.top_p * total)
        ids = ids[order[: int(last) + 1]]
    return ids


def _most_probable_ids(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids of the top_k highest logits, forbidden tokens left out; ascending among equal logits. [V] -> [N] int64"""
    num_kept = min(top_k, logits.numel()) or logits.numel()
    # topk leaves open which of several equal tokens it returns, so only its threshold is used
    threshold = -math.inf if num_kept == logits.numel() else float(logits.topk(num_kept).values[-1])
    above = torch.nonzero(logits > threshold).squeeze(1)
    if threshold == -math.inf:
        return above
    ties = torch.nonzero(logits == threshold).squeeze(1)
    return torch.cat((above, ties[: num_kept - above.numel()]))


def _checked(logits: torch.Tensor) -> torch.Tensor:
    """The logits as float32 on the CPU, refused where no token could be chosen from them."""
    if logits.dim() != 1 or logits.numel() == 0:
        raise UsageError(
            f"logits: expected one row of shape [V], found {list(logits.shape)}; pass the last position's logits"
        )
    logits = logits.detach().to("cpu", torch.float32)
    highest = float(logits.max())  # one pass finds all three: max is NaN where any logit is
    if not math.isfinite(highest):
        found = {math.inf: "+inf", -math.inf: "-inf in every place"}.get(highest, "NaN")
        raise NumericsError(
            f"logits: expected finite numbers, found {found} among {logits.numel()}; the model's arithmetic overflowed "
            "or its weights are damaged, or every token was forbidden: check the store, or convert it again"
        )
    return logits


def _penalised(logits: torch.Tensor, params: SamplingParams, recent: Sequence[int]) -> torch.Tensor:
    """The logits with the repetition penalty applied to the last tokens of recent; a copy wherever anything changes."""
    if params.repetition_penalty == 1 or params.repetition_window == 0 or len(recent) == 0:
        return logits
    window = sorted(set(recent[-params.repetition_window :]))
    if window[0] < 0 or window[-1] >= logits.numel():
        found = window[0] if window[0] < 0 else window[-1]
        raise UsageError(
            f"recent: expected token ids in 0..{logits.numel() - 1}, found {found}; pass ids of this model's tokenizer"
        )
    ids = torch.tensor(window, dtype=torch.int64)
    seen = logits[ids].double()  # float64: an extreme penalty is 0 or inf in float32, and 0 / 0 is NaN
    penalty = float(params.repetition_penalty)
    seen = torch.where(seen > 0, seen / penalty, seen * penalty)
    finite = torch.finfo(torch.float32)
    forbidden = logits[ids] == -math.inf
    return logits.index_copy(0, ids, seen.clamp(finite.min, finite.max).masked_fill(forbidden, -math.inf).float())


def _finite(field: str, value: float, expected: str) -> float:
    """The value as a float; bool, text, NaN, inf and integers beyond float64 are refused."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(field, value, number and abs(value) <= torch.finfo(torch.float64).max, expected)
    return float(value)


def _whole(field: str, value: int, low: int, high: int | None, expected: str) -> None:
    """Refuse what is no integer, or lies outside low..high."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    _require(field, value, whole and value >= low and (high is None or value <= high), expected)


def _require(field: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        # an integer of thousands of digits has no repr (sys.set_int_max_str_digits)
        huge = isinstance(value, int) and value.bit_length() > 256
        found = "an integer of more than 256 bits" if huge else reprlib.repr(value)
        raise UsageError(f"{field}: expected {expected}, found {found}; choose such a value or leave {field} out")
