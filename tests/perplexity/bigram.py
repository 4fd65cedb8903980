"""A small language model in numpy, whose perplexity can be worked out by hand.

The log-probability of a token depends on the two tokens before it (on one at the beginning of the
context), so it says how much context a window gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm.score.perplexity.windows import Window

IDENTITY: dict[str, Any] = {
    "model": {"name": "bigram", "weights_sha256": "0" * 64},
    "engine": {"dtype": "float64", "quantization": "none"},
    "versions": {"numpy": np.__version__},
}


class Bigram:
    """Random but fixed log-probabilities over a vocabulary of `size` tokens.

    Attributes:
        prompts: the prompts scored so far, each with its number of targets.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.table = _log_softmax(2 * random.normal(size=(size, size)))
        self.size = size
        self.prompts: list[tuple[list[int], int]] = []

    def logprob(self, before: Sequence[int], token: int) -> float:
        """Of `token` after `before` (at least one token), float64."""
        # A token two places back shifts the row: another distribution, normalised as well.
        shift = 0 if len(before) < 2 else before[-2] % 7
        return float(self.table[(before[-1] + shift) % self.size, token])

    def score(self, windows: Sequence[Window]) -> list[np.ndarray]:
        """Log-probabilities of the windows' targets, as an engine gives them."""
        results = []
        for window in windows:
            ids = window.token_ids
            self.prompts.append((ids, window.num_targets))
            first = len(ids) - window.num_targets
            results.append(
                np.array(
                    [self.logprob(ids[:i], ids[i]) for i in range(first, len(ids))],
                    dtype=np.float32,
                )
            )
        return results


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
