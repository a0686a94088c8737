"""Typed reading of a published config.json (or GGUF metadata in its words), with errors that name file and key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_runtime.errors import CheckpointError

LARGEST_COUNT = 1 << 31
# Counts that are looped over before any tensor bears them out; the largest models have a few hundred of each.
LOOPED_COUNTS = frozenset({"num_hidden_layers", "num_local_experts", "moe_num_primary_experts"})
LARGEST_LOOPED_COUNT = 4096


@dataclass(frozen=True, slots=True)
class RawConfig:
    """A JSON object as its publisher wrote it, and the file that it came from."""

    values: Mapping[str, object]
    file: str

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Raise CheckpointError unless it is a whole number from minimum to 2^31 (4096 for layers and experts)."""
        maximum = LARGEST_LOOPED_COUNT if key in LOOPED_COUNTS else LARGEST_COUNT
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, value, f"a whole number from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Raise CheckpointError unless it is a finite number."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        number = _finite(value)
        if number is None:
            raise self.error(key, value, "a finite number")
        return number

    def text(self, key: str, default: str | None = None) -> str:
        """Raise CheckpointError unless it is a string."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def boolean(self, key: str, *, default: bool) -> bool:
        """Raise CheckpointError unless it is true or false; published layouts write 1 and 0 too."""
        value = self.values.get(key)
        if value is None:
            return default
        if value not in (True, False):
            raise self.error(key, value, "true or false")
        return bool(value)

    def section(self, key: str) -> RawConfig | None:
        """The object under the key, or None; raise CheckpointError when it is something else."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return RawConfig(value, f"{self.file}: {key}")

    def numbers(self, key: str) -> tuple[float, ...]:
        """Raise CheckpointError unless it is a list of finite numbers."""
        value = self.values.get(key)
        numbers = [_finite(each) for each in value] if isinstance(value, list | tuple) else [None]
        found = tuple(number for number in numbers if number is not None)
        if len(found) != len(numbers):
            raise self.error(key, value, "a list of finite numbers")
        return found

    def flags(self, key: str, length: int) -> tuple[bool, ...] | None:
        """A list of 0 and 1 (or false and true), one a layer; None when the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != length or any(each not in (0, 1) for each in value):
            raise self.error(key, value, f"a list of {length} zeros and ones")
        return tuple(bool(each) for each in value)

    def names(self, key: str, length: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list of known names, one a layer; None when the key is absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != length or any(each not in known for each in value):
            raise self.error(key, value, f"a list of {length} out of {', '.join(known)}")
        return tuple(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of ids, or nothing."""
        value = self.values.get(key)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in ids):
            raise self.error(key, value, "a token id or a list of them")
        return tuple(ids)

    def error(self, key: str, found: object, expected: str) -> CheckpointError:
        """The error that says what this key should hold."""
        shown = repr(found)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return CheckpointError(f"{self.file}: {key} is {shown}, expected {expected}")


def _finite(value: object) -> float | None:
    """The number as a float, or None; a whole number of 400 digits is none that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
