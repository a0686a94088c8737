"""Added tokens: names that are cut out of a text before it is split into pieces.

The cutting itself is done by tokenizers, whose automaton finds a thousand names in one pass; a vocabulary whose own
library does not do it (sentencepiece) puts this in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import tokenizers
from tokenizers.models import WordLevel

from hybrid_runtime.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched by its name. Special ones are matched only on request and are never decoded."""

    text: str
    token_id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def as_json(self) -> Mapping[str, object]:
        """The token as the saved form keeps it."""
        return asdict(self)


def check_added(added: Iterable[AddedToken], *, file: str, field: str) -> tuple[AddedToken, ...]:
    """The tokens in id order, each once; names and ids that collide are refused."""
    by_id: dict[int, AddedToken] = {}
    by_text: dict[str, AddedToken] = {}
    for token in added:
        if not token.text:
            raise TokenizerError(f"{file}: {field}: added token {token.token_id} has an empty text; expected a name")
        if token.token_id < 0:
            raise TokenizerError(f"{file}: {field}: added token {token.text!r} has the negative id {token.token_id}")
        for known in (by_id.get(token.token_id), by_text.get(token.text)):
            if known is not None and (known.text, known.token_id) != (token.text, token.token_id):
                raise TokenizerError(
                    f"{file}: {field}: added token {token.text!r} (id {token.token_id}) collides with "
                    f"{known.text!r} (id {known.token_id}); every added token needs a name and an id of its own"
                )
        by_id.setdefault(token.token_id, token)
        by_text.setdefault(token.text, token)
    return tuple(by_id[token_id] for token_id in sorted(by_id))


class AddedTokenSplitter:
    """Cuts a text at the added tokens: a tokenizer that knows nothing else, so that all other text is one unknown."""

    def __init__(self, added: Sequence[AddedToken]) -> None:
        self._ids = [token.token_id for token in added]
        other_text = "?" * (1 + max((len(token.text) for token in added), default=0))  # longer than every name
        self._names = tokenizers.Tokenizer(WordLevel({other_text: 0}, unk_token=other_text))
        self._names.add_tokens([_as_tokenizers(token) for token in added])

    def split(self, text: str) -> Iterator[str | int]:
        """The text between added tokens as it stands, and the ids of the added tokens."""
        if not self._ids:
            if text:
                yield text
            return
        encoding = self._names.encode(text, add_special_tokens=False)
        for name_idx, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            yield self._ids[name_idx - 1] if name_idx else text[start:stop]


def _as_tokenizers(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.text, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word, normalized=False
    )
