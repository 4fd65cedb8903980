"""The columns of the float32 array that carries one request's scores through the engine.

One row per scored position: ``[targets | statistics | top ids | top log-probabilities]``, or
``[targets | statistics | whole vocabulary]``. Token ids and ranks travel as float32, which is
exact below 2**24; admission refuses larger vocabularies.
"""

from __future__ import annotations

from dataclasses import dataclass

FULL_VOCABULARY = -1
MAX_EXACT_ID = 2**24


@dataclass(frozen=True)
class RowLayout:
    """What is computed for every scored row of one request.

    Attributes:
        num_targets: candidates per position, k.
        statistics: names, in column order.
        top: number of most likely tokens (0: none, -1: the whole vocabulary).
        temperature: the logits are divided by it first.
        top_p: then only the most likely tokens are kept whose probabilities first add up to it.
    """

    num_targets: int
    statistics: tuple[str, ...] = ()
    top: int = 0
    temperature: float = 1.0
    top_p: float = 1.0

    def width(self, vocab_size: int) -> int:
        """Number of columns."""
        tail = vocab_size if self.top == FULL_VOCABULARY else 2 * self.top
        return self.num_targets + len(self.statistics) + tail

    @property
    def needs_logits(self) -> bool:
        """Whether whole rows of logits have to be held at once."""
        return self.top != 0 or self.top_p < 1

    @property
    def statistics_columns(self) -> slice:
        return slice(self.num_targets, self.num_targets + len(self.statistics))

    @property
    def top_start(self) -> int:
        return self.num_targets + len(self.statistics)
