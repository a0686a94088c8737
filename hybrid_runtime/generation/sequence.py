"""One sequence of tokens and its KV cache: prefill what is new of a prompt, then decode one token at a time."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence

import torch

from hybrid_kernels.team import WorkerGoneError
from hybrid_runtime.budget import PREFILL_BATCH
from hybrid_runtime.errors import ContextOverflow, NumericsError, UsageError, WorkerError
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
        self._epoch = 0
        self._longest = 0

    def prefill(self, prompt: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Logits [V] after the prompt, and how many of its tokens were still cached."""
        shared = self._shared_prefix(prompt)
        self._forget_from(shared)
        logits = torch.empty(0)
        for start in range(shared, len(prompt), PREFILL_BATCH):
            batch = prompt[start : start + PREFILL_BATCH]
            for part in self._parts(batch):
                logits = self._advance(part, prompt_end=len(prompt))[-1]
        return logits, shared

    def step(self, token: int) -> torch.Tensor:
        """Logits [V] after one more token."""
        return self._advance([token])[-1]

    def score(self, tokens: Sequence[int]) -> Iterator[torch.Tensor]:
        """Logits [T, V] after each of the tokens, a batch at a time; the context begins anew."""
        self._forget_from(0)
        for start in range(0, len(tokens), PREFILL_BATCH):
            batch = tokens[start : start + PREFILL_BATCH]
            yield self._advance(batch, prompt_end=len(tokens), all_logits=True)

    @property
    def is_full(self) -> bool:
        """Whether not one more token fits the context."""
        return self.cache.length >= self.cache.num_positions

    @property
    def epoch(self) -> int:
        """Counts the prompts begun: whoever finds another number than after its own prefill has lost the sequence."""
        return self._epoch

    def _parts(self, batch: Sequence[int]) -> Iterator[Sequence[int]]:
        """The batch as a whole, or its tokens one by one where that is quicker."""
        if len(batch) <= self.decoder.most_tokens_one_by_one:
            yield from ([token] for token in batch)
        else:
            yield batch

    def _forget_from(self, length: int) -> None:
        self._epoch += 1
        self.cache.truncate(length)
        self.tokens = self.tokens[:length]
        self._longest = self._longest if length else 0

    def _advance(self, tokens: Sequence[int], *, prompt_end: int = 0, all_logits: bool = False) -> torch.Tensor:
        self._longest = max(self._longest, self.cache.length + len(tokens), prompt_end)
        ids = torch.tensor(tokens, dtype=torch.int64)
        try:
            logits = self.decoder.forward(ids, self.cache, all_logits=all_logits, prompt_end=prompt_end)
        except WorkerGoneError as error:
            raise WorkerError(str(error)) from error
        self.tokens.extend(tokens)
        if not torch.isfinite(logits).all():
            num_tokens = len(self.tokens)
            self._forget_from(0)
            raise NumericsError(
                f"the model computed NaN or Inf after {num_tokens} tokens; its weights or --ffn-activation are wrong"
            )
        return logits

    def _shared_prefix(self, prompt: Sequence[int]) -> int:
        """Longest common prefix, but never the whole prompt: its last token must be computed for its logits."""
        rope = self.decoder.config.rope
        longest = max(self._longest, len(prompt))
        if rope is not None and rope.kind == "longrope" and longest > rope.original_max_position_embeddings:
            return 0  # keys depend on how long the prompt was that they belonged to
        shared = 0
        for ours, theirs in zip(self.tokens[: self.cache.length], prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared


class Generation:
    """One answer: iterate over it for its tokens; `report` says afterwards what it did, also when it was left early."""

    def __init__(
        self,
        sequence: TokenSequence,
        prompt: Sequence[int],
        params: SamplingParams,
        end_ids: Collection[int],
        num_token_ids: int | None = None,
    ) -> None:
        """num_token_ids: how many ids the tokenizer has text for; a padded head's others are never drawn."""
        self._sequence = sequence
        self._prompt = check_prompt(prompt, sequence)
        self._params = params
        self._end_ids = end_ids
        self._num_token_ids = num_token_ids
        self._cached_tokens = 0
        self._num_generated = 0
        self._finish_reason: FinishReason = "cancelled"
        self._started_s = self._ended_s = time.perf_counter()
        self._first_token_s: float | None = None

    def __iter__(self) -> Generator[int, None, None]:
        """Tokens as they are drawn, without the one that ends the turn."""
        sampler = Sampler(self._params)
        self._started_s = time.perf_counter()
        try:
            logits, self._cached_tokens = self._sequence.prefill(self._prompt)
            epoch = self._sequence.epoch
            while True:
                token = self._draw(sampler, logits)
                if token in self._end_ids:
                    self._finish_reason = "end"
                    return
                yield token
                if self._num_generated == self._params.max_tokens:
                    self._finish_reason = "length"
                    return
                if self._sequence.epoch != epoch:
                    raise UsageError(
                        "another prompt was begun before this answer's end; an Engine answers one at a time"
                    )
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
        first_token_s = self._ended_s if self._first_token_s is None else self._first_token_s
        return GenerationReport(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached_tokens,
            generated_tokens=self._num_generated,
            prefill_s=first_token_s - self._started_s,
            decode_s=self._ended_s - first_token_s,
            time_to_first_token_s=first_token_s - self._started_s,
            finish_reason=self._finish_reason,
        )

    def _draw(self, sampler: Sampler, logits: torch.Tensor) -> int:
        window = self._params.repetition_window
        recent = self._sequence.tokens[-window:] if window else []
        token = sampler.sample(logits[: self._num_token_ids], recent)
        self._num_generated += 1
        if self._first_token_s is None:
            self._first_token_s = time.perf_counter()
        return token


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
