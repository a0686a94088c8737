"""A forward cursor over the head of a GGUF file: numbers, strings and counts, each checked before it is believed.

Every length in the file is compared with the bytes that are left, and with a fixed limit, before anything is allocated
or looped over; a hostile count therefore costs nothing. The fixed limits exist because a sparse file of a terabyte is
cheap to make: within them the parsed header stays below 500 MB. What the fields mean is `gguf_metadata.py`'s and
`gguf_file.py`'s.
"""

from __future__ import annotations

import struct

from hybrid_runtime.checkpoints.file_reading import OpenFile
from hybrid_runtime.errors import CheckpointError

# The largest published vocabularies (262k tokens with scores, types and merges) need 16 MB.
MAX_HEADER_BYTES = 64 << 20
WINDOW_BYTES = 1 << 20
STRING_LENGTH = struct.Struct("<Q")
UINT32 = struct.Struct("<I")


class HeaderReader:
    """Reads fields one after the other from the start of `file`; each names itself for the error messages."""

    def __init__(self, file: OpenFile) -> None:
        self.path = file.path
        self._file = file
        self._window = b""
        self._window_start = 0  # where in the file the window begins
        self._next = 0  # where in the window the next field begins

    @property
    def position(self) -> int:
        """Where in the file the next field begins."""
        return self._window_start + self._next

    @property
    def remaining(self) -> int:
        """How many bytes the file has from `position` on."""
        return self._file.num_bytes - self.position

    def take(self, num_bytes: int, field: str) -> bytes:
        """The next bytes; more than the file holds or than a header may have is refused before reading."""
        if self._next + num_bytes > len(self._window):
            self._refill(num_bytes, field)
        start = self._next
        self._next += num_bytes
        return self._window[start : self._next]

    def uint32(self, field: str) -> int:
        """The next field as unsigned 32-bit number."""
        return int.from_bytes(self.take(4, field), "little")

    def uint64(self, field: str) -> int:
        """The next field as unsigned 64-bit number."""
        return int.from_bytes(self.take(8, field), "little")

    def count(self, field: str, item_bytes: int, limit: int) -> int:
        """A 64-bit count of items of at least `item_bytes` each, which must fit the rest of the file and the limit."""
        found = self.uint64(field)
        if found * item_bytes > self.remaining:
            raise CheckpointError(
                f"{self.path}: {field} is {found}, but the {self.remaining} bytes left hold at most "
                f"{self.remaining // item_bytes}; the file is cut short or damaged: fetch it again"
            )
        if found > limit:
            raise CheckpointError(f"{self.path}: {field} is {found}, expected at most {limit}; not a model file")
        return found

    def string(self, field: str, limit: int = MAX_HEADER_BYTES) -> str:
        """The next field as UTF-8 text with its length in front, `limit` in bytes."""
        text = self.take(self.count(f"length of {field}", item_bytes=1, limit=limit), field)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: {field} is not UTF-8 at its byte {error.start}; the file is damaged: fetch it again"
            ) from error

    def strings(self, count: int, field: str) -> tuple[str, ...]:
        """`count` strings, fast: a vocabulary has hundreds of thousands."""
        found: list[str] = []
        while len(found) < count:
            self._next += self._strings_in_window(found, count)
            if len(found) < count:
                # one that crosses the window's end or is broken: the slow way refills, or names the fault
                found.append(self.string(f"{field}[{len(found)}]"))
        return tuple(found)

    def _strings_in_window(self, found: list[str], count: int) -> int:
        """Appends the whole valid strings of the window to `found`, up to `count`; returns the bytes they took."""
        window, position = self._window, self._next
        length_at, append = STRING_LENGTH.unpack_from, found.append
        last_start = len(window) - STRING_LENGTH.size
        try:
            for _ in range(count - len(found)):
                if position > last_start:
                    break
                end = position + 8 + length_at(window, position)[0]
                if end > len(window):
                    break
                append(window[position + 8 : end].decode())
                position = end
        except UnicodeDecodeError:
            pass  # `string` meets the same bytes next and says where they are
        return position - self._next

    def _refill(self, num_bytes: int, field: str) -> None:
        position = self.position
        if num_bytes > self.remaining:
            raise CheckpointError(
                f"{self.path}: {field} needs {num_bytes} bytes at byte {position}, the file has {self.remaining} left; "
                "it is cut short: fetch it again"
            )
        if position + num_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path}: header reaches byte {position + num_bytes} in {field}, expected at most "
                f"{MAX_HEADER_BYTES}; not a model file"
            )
        self._window = self._file.read(position, min(max(num_bytes, WINDOW_BYTES), self.remaining))
        self._window_start, self._next = position, 0
