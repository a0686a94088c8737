"""Which ids surround a text and which end a turn, resolved from every file that has a say."""

from __future__ import annotations

from collections.abc import Iterable

from hybrid_runtime.errors import TokenizerError
from hybrid_runtime.text.folder_settings import FolderSettings, NamedId, NamedToken
from hybrid_runtime.text.sentencepiece_vocabulary import SentencePieceVocabulary
from hybrid_runtime.text.tokenizer import SpecialIds, Vocabulary

# Names that chat models end a turn with. Checkpoints often declare only one of theirs, and a model that writes another
# would talk on to itself.
END_OF_TURN_TOKENS = (
    "</s>",
    "<EOT>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|end|>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)


def folder_special_ids(
    vocabulary: Vocabulary, settings: FolderSettings, *, file: str, extra_end_ids: Iterable[int]
) -> SpecialIds:
    """The special ids of a checkpoint folder."""
    bos_id = _token_id(vocabulary, settings.bos_token)
    eos_id = _token_id(vocabulary, settings.eos_token)
    add_bos = settings.add_bos
    if isinstance(vocabulary, SentencePieceVocabulary):
        bos_id = vocabulary.model_bos_id if bos_id is None else bos_id
        eos_id = vocabulary.model_eos_id if eos_id is None else eos_id
        add_bos = bos_id is not None if add_bos is None else add_bos
    if bos_id is None and len(vocabulary.prefix_ids) == 1:
        bos_id = vocabulary.prefix_ids[0]
    if bos_id is None and settings.bos_ids:
        bos_id = checked_id(vocabulary, settings.bos_ids[0])
    ends = [*settings.end_ids, *(NamedId(token_id, "extra_end_ids") for token_id in extra_end_ids)]
    if eos_id is None and settings.end_ids:
        eos_id = checked_id(vocabulary, settings.end_ids[0])
    if bos_id is None and add_bos:
        raise TokenizerError(f"{file}: add_bos_token is true, but no file names a bos_token; add it or set it to false")
    return SpecialIds(
        bos_id=bos_id,
        eos_id=eos_id,
        # a template in the vocabulary's own file goes before the flags, as in transformers
        prefix_ids=vocabulary.prefix_ids or _only_if(add_bos, bos_id),
        suffix_ids=vocabulary.suffix_ids or _only_if(settings.add_eos, eos_id),
        end_ids=end_ids(vocabulary, eos_id, ends),
    )


def end_ids(vocabulary: Vocabulary, eos_id: int | None, named: Iterable[NamedId]) -> frozenset[int]:
    """Every id that ends a turn: the tokenizer's own, those that files name, and the well-known names."""
    ids = {checked_id(vocabulary, named_id) for named_id in named}
    for name in END_OF_TURN_TOKENS:
        token_id = vocabulary.id_of(name)
        if token_id is not None and vocabulary.is_added(token_id):
            ids.add(token_id)
    return frozenset(ids if eos_id is None else ids | {eos_id})


def checked_id(vocabulary: Vocabulary, named: NamedId) -> int:
    """The id, if the vocabulary has it."""
    if not 0 <= named.token_id < vocabulary.size:
        raise TokenizerError(
            f"{named.source}: found {named.token_id}, which is outside the vocabulary of {vocabulary.size} tokens; "
            "the file and the tokenizer belong to different models"
        )
    return named.token_id


def _token_id(vocabulary: Vocabulary, token: NamedToken | None) -> int | None:
    if token is None:
        return None
    token_id = vocabulary.id_of(token.text)
    if token_id is None:
        raise TokenizerError(
            f"{token.source}: found {token.text!r}, which is not in the vocabulary of {vocabulary.size} tokens; "
            "the file and the tokenizer belong to different models"
        )
    return token_id


def _only_if(flag: bool | None, token_id: int | None) -> tuple[int, ...]:
    return (token_id,) if flag and token_id is not None else ()
