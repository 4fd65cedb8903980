"""Checks of what a piece of work holds; every error names the field, the value and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np

from vllm.score.engine.request import ModelFacts, read_token_ids
from vllm.score.errors import ScoreModeError


def token_ids(field: str, given: Any, facts: ModelFacts) -> np.ndarray:
    """Checked token ids, int64 [n]."""
    if isinstance(given, str):
        raise ScoreModeError(
            f"{field} must be a list of token ids, got str; encode texts with the driver's "
            "tokenizer."
        )
    ids = read_token_ids(given, facts.vocab_size, field)
    if not len(ids):
        raise ScoreModeError(f"{field} is empty: give at least one token id.")
    return ids


def check_room(context: int, tokens: int, field: str, facts: ModelFacts) -> None:
    if context + tokens > facts.max_model_len:
        raise ScoreModeError(
            f"context has {context} tokens, with {tokens} of {field} {context + tokens}; the "
            f"engine's max_model_len is {facts.max_model_len}: shorten the context or ask for less."
        )


def whole(field: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number in a range, or ScoreModeError."""
    good = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not good or value < low or (high is not None and value > high):
        limits = f"from {low} on" if high is None else f"from {low} to {high}"
        raise ScoreModeError(f"{field} must be a whole number {limits}, got {value!r}.")
    return int(value)


def number(field: str, value: Any) -> float:
    """A finite number, or ScoreModeError."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ScoreModeError(f"{field} must be a finite number, got {value!r}.")
    return float(value)
