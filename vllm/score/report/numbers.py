"""Numbers as people read them."""

from __future__ import annotations

import math

HASH_DIGITS = 12  # of a sha256, where people compare by eye


def significant(value: float, digits: int = 6) -> str:
    """A number with so many significant digits, at most 4 of them after the point.

    >>> significant(26.48123), significant(0.0123456), significant(2048.0)
    ('26.4812', '0.0123', '2048.00')
    """
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 10**digits:
        return f"{value:.{digits - 3}e}"
    whole = 1 if abs(value) < 1 else math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(0, min(4, digits - whole))}f}"


def count(number: int) -> str:
    """A count with its thousands apart."""
    return f"{number:,}"


def short_hash(digest: str) -> str:
    """The first digits of a hash; words such as "unknown" as they are."""
    return digest[:HASH_DIGITS]
