"""One sequence of tokens and its KV cache: prefill what is new of a prompt, then decode one token at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence

import torch

from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.errors import ContextOverflow, NumericsError, UsageError
from hybrid_runtime.generation.report import FinishReason, GenerationReport
from hybrid_runtime.generation.sampling import Sampler, SamplingParams
from hybrid_runtime.model.decoder import Decoder
from hybrid_runtime.model.kv_cache import KvCache


class TokenSequence:
    """The tokens that a KV cache holds. A new prompt keeps the longest prefix that it shares with them."""

    def __init__(self, decoder: Decoder, cache: KvCache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.tokens: list[int] = []

    def prefill(self, prompt: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Logits [V] after the prompt, and how many of its tokens were still cached."""
        shared = self._shared_prefix(prompt)
        self.cache.truncate(shared)
        self.tokens = list(prompt[:shared])
        logits = torch.empty(0)
        for start in range(shared, len(prompt), PREFILL_BATCH):
            logits = self._advance(prompt[start : start + PREFILL_BATCH])
        return logits, shared

    def step(self, token: int) -> torch.Tensor:
        """Logits [V] after one more token."""
        return self._advance([token])

    @property
    def is_full(self) -> bool:
        """Whether not one more token fits the context."""
        return self.cache.length >= self.cache.num_positions

    def _advance(self, tokens: Sequence[int]) -> torch.Tensor:
        logits = self.decoder.forward(torch.tensor(tokens, dtype=torch.int64), self.cache)[-1]
        self.tokens.extend(tokens)
        if not torch.isfinite(logits).all():
            raise NumericsError(
                f"the model computed NaN or Inf after {len(self.tokens)} tokens; "
                "its weights or --ffn-activation are wrong"
            )
        return logits

    def _shared_prefix(self, prompt: Sequence[int]) -> int:
        """Longest common prefix, but never the whole prompt: its last token must be computed for its logits."""
        shared = 0
        for ours, theirs in zip(self.tokens[: self.cache.length], prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared


class Generation:
    """One answer: iterate over it for its tokens; `report` says afterwards what it did, also when it was left early."""

    def __init__(
        self, sequence: TokenSequence, prompt: Sequence[int], params: SamplingParams, end_ids: Collection[int]
    ) -> None:
        self._sequence = sequence
        self._prompt = check_prompt(prompt, sequence)
        self._params = params
        self._end_ids = end_ids
        self._cached_tokens = 0
        self._generated: list[int] = []
        self._finish_reason: FinishReason = "cancelled"
        self._started_s = self._first_token_s = self._ended_s = time.perf_counter()

    def __iter__(self) -> Generator[int, None, None]:
        """Tokens as they are drawn, without the one that ends the turn."""
        sampler = Sampler(self._params)
        self._started_s = time.perf_counter()
        try:
            logits, self._cached_tokens = self._sequence.prefill(self._prompt)
            while True:
                window = self._params.repetition_window
                recent = [*self._prompt, *self._generated][-window:] if window else []
                token = sampler.sample(logits, recent)
                self._count(token)
                if token in self._end_ids:
                    self._finish_reason = "end"
                    return
                yield token
                if len(self._generated) == self._params.max_tokens:
                    self._finish_reason = "length"
                    return
                if self._sequence.is_full:
                    self._finish_reason = "context"
                    return
                logits = self._sequence.step(token)
        finally:
            self._ended_s = time.perf_counter()

    def stop(self) -> None:
        """Say that the caller left because of a stop string, which only the text shows."""
        self._finish_reason = "stop"

    @property
    def report(self) -> GenerationReport:
        """Counts and times so far."""
        return GenerationReport(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached_tokens,
            generated_tokens=len(self._generated),
            prefill_s=self._first_token_s - self._started_s,
            decode_s=self._ended_s - self._first_token_s,
            time_to_first_token_s=self._first_token_s - self._started_s,
            finish_reason=self._finish_reason,
        )

    def _count(self, token: int) -> None:
        self._generated.append(token)
        if len(self._generated) == 1:
            self._first_token_s = time.perf_counter()


def check_prompt(prompt: Sequence[int], sequence: TokenSequence) -> Sequence[int]:
    """Raise ContextOverflow or UsageError for a prompt that cannot be computed, before anything is."""
    room = sequence.cache.num_positions
    if not prompt:
        raise UsageError("the prompt has no tokens, and the model no token to begin with; give some text")
    if len(prompt) > room:
        raise ContextOverflow(
            f"the prompt has {len(prompt)} tokens, the context holds {room}; "
            f"shorten it or give --ctx {len(prompt) + 256}"
        )
    vocab_size = sequence.decoder.config.vocab_size
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise UsageError(f"token id {token} in the prompt is not between 0 and vocab_size {vocab_size}")
    return prompt
