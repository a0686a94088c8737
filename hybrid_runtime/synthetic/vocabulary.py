"""A tokenizer of any size for weights that know no language: single bytes, and made-up words that no text contains."""

from __future__ import annotations

from hybrid_runtime.config import ModelConfig
from hybrid_runtime.text.added_tokens import AddedToken
from hybrid_runtime.text.bpe_splits import bpe_split
from hybrid_runtime.text.tokenizer import SpecialIds, VocabularyTokenizer
from hybrid_runtime.text.tokenizers_vocabulary import byte_level_bpe

_SPECIAL = ("<unk>", "<s>", "</s>")
_BOS, _EOS = 1, 2
SMALLEST_VOCABULARY = len(_SPECIAL) + 256


def synthetic_tokenizer(config: ModelConfig) -> VocabularyTokenizer:
    """Ids 0 to 2 are special, the next 256 are bytes, the others ` word259` and so on, up to config's vocab_size."""
    from tokenizers import pre_tokenizers  # noqa: PLC0415  # only where a vocabulary is made

    assert config.vocab_size >= SMALLEST_VOCABULARY
    pieces = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [
        f"\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}word{token_id}" for token_id in range(len(pieces), config.vocab_size)
    ]
    added = [AddedToken(text, token_id, special=True) for token_id, text in enumerate(_SPECIAL)]
    vocabulary = byte_level_bpe(
        {piece: token_id for token_id, piece in enumerate(pieces)},
        [],
        bpe_split("gpt-2", file="synthetic"),
        added,
        file="synthetic",
    )
    special = SpecialIds(
        bos_id=_BOS, eos_id=_EOS, prefix_ids=(_BOS,), suffix_ids=(), end_ids=frozenset((_EOS, *config.eos_token_ids))
    )
    return VocabularyTokenizer(vocabulary, special)
