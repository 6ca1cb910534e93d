"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from boft_export.errors import UsageError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*$", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return a size in bytes: ``5GB`` is 5 * 10^9, ``700MiB`` is 700 * 2^20, a bare number is bytes.

    Raises:
        UsageError: If the text is not a size, or not above 0.
    """
    match = _SIZE.match(str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(Fraction(match[1]) * unit) if match and unit else 0
    if size <= 0:
        raise UsageError(f"{text} is not a size.", hint="Write 5GB, 700MiB, or a number of bytes.")
    return size


def format_size(count: int) -> str:
    """Return bytes as people read them: 13.5 GB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        # From here on three digits would round to 1000.
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
