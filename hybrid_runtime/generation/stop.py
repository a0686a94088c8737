"""Where an answer ends because the caller named a string that ends it.

Text arrives in pieces that know nothing of stop strings, so the tail of what was pushed may be the start of one. Only
that tail is held back; everything before it is emitted at once. Nothing here knows tokens: text goes in, text comes
out. One character costs O(number of stop strings), however the pieces are cut.

A generation ends at the character that first completes any stop string, because no model step may be spent after
that; of several that this character completes, the longest wins, so that no part of any of them is emitted. The
outcome is therefore the same for every way of cutting the text into pieces.
"""

from __future__ import annotations

from hybrid_runtime.errors import UsageError

MAX_STOP_STRINGS = 64


def check_stop_strings(stop: tuple[str, ...]) -> None:
    """Refuse what cannot end an answer: a bare string (it would stop at each of its letters), '' or too many."""
    if not isinstance(stop, tuple):
        raise UsageError(
            f"stop: expected a tuple of strings, found a {type(stop).__name__}; write stop=('END',) for a single one"
        )
    if len(stop) > MAX_STOP_STRINGS:
        raise UsageError(
            f"stop: expected at most {MAX_STOP_STRINGS} strings, found {len(stop)}; keep the ones that matter"
        )
    for idx, string in enumerate(stop):
        if not isinstance(string, str):
            raise UsageError(
                f"stop[{idx}]: expected a string, found a {type(string).__name__}; pass text, not token ids"
            )
        if not string:
            raise UsageError(
                f"stop[{idx}]: expected at least one character, found ''; remove it, it would stop at once"
            )


class StopMatcher:
    """Passes text through up to the first stop string; one matcher serves one answer."""

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        check_stop_strings(stop)
        self._prefixes = tuple(_Prefix(string) for string in dict.fromkeys(stop))
        self._held = ""
        self._flushed = False
        self._matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed: nothing will be emitted any more."""
        return self._matched is not None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the answer, for an API that reports it; None while there is none."""
        return self._matched

    @property
    def held(self) -> str:
        """The text that waits, because it may turn out to be the start of a stop string."""
        return self._held

    def push(self, text: str) -> str:
        """Take the next piece of the answer and return what may be shown; '' once stopped."""
        assert not self._flushed, "push after flush: an answer has one end"
        if self.stopped or not self._prefixes:
            return "" if self.stopped else text
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            completed = [prefix.string for prefix in self._prefixes if prefix.advance(char)]
            if completed:
                self._matched = max(completed, key=len)
                self._held = ""
                return pending[: end - len(self._matched)]
        emitted = len(pending) - max(prefix.matched for prefix in self._prefixes)
        self._held = pending[emitted:]
        return pending[:emitted]

    def flush(self) -> str:
        """End the answer and return the text still held back: the stop string it could have started never came."""
        self._flushed = True
        held, self._held = self._held, ""
        return held


class _Prefix:
    """How much of one stop string the text ends with right now (Knuth-Morris-Pratt: no character is read twice)."""

    __slots__ = ("_borders", "matched", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = _borders(string)

    def advance(self, char: str) -> bool:
        """Read one character of text; True when it completes the string."""
        self.matched = _extended(self.string, self._borders, self.matched, char)
        return self.matched == len(self.string)


def _extended(string: str, borders: list[int], matched: int, char: str) -> int:
    """Length of the longest prefix of string that ends with char, given the one that ended before it."""
    while matched and string[matched] != char:
        matched = borders[matched]
    return matched + 1 if string[matched] == char else 0


def _borders(string: str) -> list[int]:
    """borders[n]: length of the longest proper prefix of string[:n] that is also its suffix."""
    borders = [0, 0]
    for char in string[1:]:
        borders.append(_extended(string, borders, borders[-1], char))
    return borders
