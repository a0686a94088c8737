"""Amounts of memory as people write them, and back.

One letter means 1024, as in `ulimit`, `docker --memory` and the JVM: 8G = 8GiB = 8 * 2**30 bytes. Only an explicit
decimal unit, as on a disk's box, means 1000: 8GB = 8 * 10**9 bytes. Upper and lower case are the same.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from hybrid_runtime.errors import UsageError

MAX_BYTES: Final = 2**60  # more than any machine has: a larger amount is a slip of the pen
_PREFIXES: Final = "KMGTPE"
_AMOUNT: Final = re.compile(
    r"([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30}) ?(?:([KMGTPE])(I|B|IB)?|B)?", re.ASCII | re.IGNORECASE
)
_ACCEPTED: Final = "8G or 8GiB (8 * 2**30 bytes), 1.5G, 512M, 8GB (8 * 10**9 bytes), 8589934592 (bytes), 0"


def parse_bytes(text: str) -> int:
    """The number of bytes that text names, rounded down to a whole byte: a budget is never exceeded by rounding."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise UsageError(
            f"size {shown!r}: expected a number and a unit, found something else; write for example {_ACCEPTED}"
        )
    number, prefix, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    unit = base ** (_PREFIXES.index(prefix.upper()) + 1) if prefix else 1
    amount = Fraction(number) * unit
    if unit == 1 and amount.denominator != 1:
        raise UsageError(
            f"size {text.strip()!r}: expected whole bytes, found a fraction of one; add the unit, as in {_ACCEPTED}"
        )
    if amount > MAX_BYTES:
        raise UsageError(
            f"size {text.strip()!r}: expected at most 2**60 bytes (1 EiB), found more; write for example {_ACCEPTED}"
        )
    return int(amount)


def format_bytes(num_bytes: int) -> str:
    """Two decimals and the largest binary unit that is not above num_bytes, as in '1.50 GiB'; '512 B' below 1 KiB."""
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if size < 1024:
        return f"{sign}{size} B"
    exponent = min((size.bit_length() - 1) // 10, len(_PREFIXES))
    shown = f"{size / 1024**exponent:.2f}"
    if shown == "1024.00" and exponent < len(_PREFIXES):  # rounding reached the next unit
        shown, exponent = "1.00", exponent + 1
    return f"{sign}{shown} {_PREFIXES[exponent - 1]}iB"


def format_decimal_bytes(num_bytes: float) -> str:
    """Decimal units, as disks, networks and model pages count them: 5368709120 -> '5.37 GB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
