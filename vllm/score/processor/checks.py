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
