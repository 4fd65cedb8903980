"""Checks that several modules share."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from vllm.score.errors import ScoreModeError


def positive(name: str, value: Any) -> int:
    """`value`, a whole number of at least 1.

    Raises:
        ScoreModeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ScoreModeError(f"{name} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def check_seed(seed: Any) -> None:
    """Raise ScoreModeError for what is neither None nor a seed of every generator."""
    good = isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) < 1 << 63
    if seed is not None and not good:
        raise ScoreModeError(
            f"seed must be None or a whole number from 0 to 2**63 - 1, got {seed!r}."
        )
