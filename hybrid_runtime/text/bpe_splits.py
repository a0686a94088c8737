"""How byte-level BPE vocabularies of GGUF files cut a text into words, by the name in tokenizer.ggml.pre.

A GGUF file holds only the name; the patterns belong to the models that carry it (GPT-2, Llama 3, Qwen 2, ...). They
are applied one after the other, each to the pieces that the one before has left. An unknown name is refused: a wrong
pattern gives ids that look right and are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from hybrid_runtime.errors import TokenizerError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONE_DIGIT = r"\p{N}"
_THREE_DIGITS = r"[0-9][0-9][0-9]"


@dataclass(frozen=True, slots=True)
class BpeSplit:
    """The patterns of one kind of vocabulary, and what else the name implies."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as a whole needs no merges
    add_bos: bool = False  # where the file does not say


def bpe_split(name: str, *, file: str) -> BpeSplit:
    """The split of a tokenizer.ggml.pre name."""
    known = _known_splits()
    if name not in known:
        raise TokenizerError(
            f"{file}: tokenizer.ggml.pre: found {name!r}, which is not known here; known are {', '.join(sorted(known))}"
        )
    return known[name]


def _words_and_numbers(digits: str) -> str:
    """Contractions in either case, words with at most one sign before them, numbers, signs, line ends, spaces."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@cache
def _known_splits() -> Mapping[str, BpeSplit]:
    llama3 = _words_and_numbers(r"\p{N}{1,3}")
    families = {
        ("gpt-2", "mpt", "olmo", "phi-2", "roberta-bpe"): BpeSplit((_GPT2,)),
        ("falcon3", "llama-bpe", "llama-v3", "llama3"): BpeSplit((llama3,), ignore_merges=True, add_bos=True),
        ("dbrx", "smaug-bpe"): BpeSplit((llama3,)),
        ("deepseek-r1-qwen", "qwen2", "stablelm2"): BpeSplit((_words_and_numbers(_ONE_DIGIT),)),
        ("codeshell", "command-r", "refact", "smollm", "starcoder"): BpeSplit((_ONE_DIGIT, _GPT2)),
        ("falcon",): BpeSplit((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, _THREE_DIGITS)),
        ("default",): BpeSplit((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", _THREE_DIGITS)),
    }
    return {name: split for names, split in families.items() for name in names}
