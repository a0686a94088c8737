"""What one generation did and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

FinishReason = Literal["end", "stop", "length", "context", "cancelled"]
"""end: an end-of-turn token; stop: a stop string; length: max_tokens; context: no room; cancelled: the caller left."""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """Counts in tokens, times in seconds. cached_tokens of the prompt were still in the KV cache and cost nothing."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float
    finish_reason: FinishReason

    @property
    def prefill_tokens_per_s(self) -> float:
        """Speed of the prompt's computed part."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Speed of the answer; its first token is the prefill's."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 and self.generated_tokens > 1 else 0.0

    def to_json(self) -> dict[str, object]:
        """Fields and speeds as plain values."""
        return asdict(self) | {
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }
