"""Small functions that several tests share."""

from __future__ import annotations

import numpy as np


def token_logprobs(log_softmax: np.ndarray, ids: list[int]) -> np.ndarray:
    """Log-probabilities of ids[1:] from the rows before them."""
    return log_softmax[np.arange(len(ids) - 1), ids[1:]]


def random_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, n).tolist() for n in lengths]
