"""Perplexities that need no model, to read a model's figure against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vllm.score.errors import ScoreModeError


def uniform_perplexity(vocab_size: int) -> float:
    """Perplexity of a guess that gives every entry of the vocabulary the same probability: V.

    Raises:
        ScoreModeError: for a `vocab_size` below 1.
    """
    if vocab_size < 1:
        raise ScoreModeError(f"vocab_size is {vocab_size}; it must be at least 1")
    return float(vocab_size)


def count_tokens(token_ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token occurs: int64 [V].

    Raises:
        ScoreModeError: for ids that are no integers or lie outside [0, V).
    """
    return np.bincount(_checked(token_ids, vocab_size), minlength=vocab_size).astype(np.int64)


def unigram_perplexity(token_ids: Sequence[int] | np.ndarray, counts: np.ndarray) -> float:
    """Perplexity of tokens when each is predicted from its frequency elsewhere, without context.

    With c_t the count of token t in the training text, N the sum of the counts and V their
    number, p(t) = (c_t + 1) / (N + V) (add-one smoothing, so no token is impossible), and the
    result is exp(-mean over the given tokens of ln p).

    Args:
        token_ids: int [n], the tokens to predict. A model without BOS cannot predict the first
            token of a text: leave it out here too when the two are compared.
        counts: int [V], of the training text.

    Raises:
        ScoreModeError: for no tokens, ids that are no integers or lie outside [0, V), or counts
            that are not whole numbers of 0 or more.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.size == 0 or counts.min() < 0:
        raise ScoreModeError(
            f"counts has shape {counts.shape} and dtype {counts.dtype}; it must be a vector of "
            "whole numbers of 0 or more, one for each entry of the vocabulary"
        )
    ids = _checked(token_ids, len(counts))
    if ids.size == 0:
        raise ScoreModeError("token_ids is empty; a perplexity needs at least one token")
    log_probabilities = np.log(counts + 1.0) - math.log(float(counts.sum()) + len(counts))
    return math.exp(-float(np.mean(log_probabilities[ids])))


def _checked(token_ids: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    ids = np.asarray(token_ids)
    if ids.size == 0:
        return np.zeros(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ScoreModeError(
            f"token_ids has shape {ids.shape} and dtype {ids.dtype}; it must be a vector of "
            "integers"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ScoreModeError(
            f"token_ids holds {low if low < 0 else high}, outside the vocabulary of {vocab_size}"
        )
    return ids.astype(np.int64)
