"""The losses of a run in short: along the text, their distribution, the hardest tokens.

One pass over the tokens in bounded memory, whatever their number.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm.score.perplexity.metrics import PerplexityResult

MOST_BLOCKS = 200  # points of the curve: more cannot be told apart on a page
SMALLEST_BLOCK = 16  # tokens; a mean of fewer follows the single tokens
MOST_POINTS = 2000  # up to so many tokens each is drawn by itself
HARDEST = 50
CONTEXT_CHARACTERS = 120
_STEP = 1e-3  # nats; resolution of the median
_LONGEST = 100.0  # nats; larger losses are counted here, float32 log-softmax seldom exceeds it


@dataclass(frozen=True)
class HardToken:
    """A token with a high loss.

    text: its characters; None where they are not known. context: the scored characters before it.
    loss: nats.
    """

    position: int
    token_id: int
    text: str | None
    context: str
    loss: float


@dataclass(frozen=True)
class LossSummary:
    """Losses are nats per token.

    mean: exact, in float64; median: to 0.001 nats (the lower one of an even number).
    block_position: float64 [b], mean position of a block's tokens in the text.
    block_mean, block_low, block_high: float64 [b], mean, 10th and 90th percentile of each block.
    positions, losses: int64 and float64 [n] of each token, where there are at most `MOST_POINTS`;
        else empty.
    counts: int64 [100000], tokens by loss in steps of 0.001 nats; the last also of all above.
    hardest: highest loss first.
    """

    tokens: int
    mean: float
    median: float
    largest: float
    block_position: np.ndarray
    block_mean: np.ndarray
    block_low: np.ndarray
    block_high: np.ndarray
    positions: np.ndarray
    losses: np.ndarray
    counts: np.ndarray
    hardest: tuple[HardToken, ...]

    def histogram(self, bins: int = 60, covered: float = 0.999) -> tuple[np.ndarray, np.ndarray]:
        """Share of the tokens by loss, from 0 to a loss that at least `covered` of them keep to:
        a few far out would press the others together.

        Returns:
            edges: float64 [bins + 1], nats.
            shares: float64 [bins]; 1 minus their sum lies beyond the last edge.
        """
        width = -(-(_rank(self.counts, covered) + 1) // bins)
        padded = np.zeros(max(width * bins, len(self.counts)), dtype=np.int64)
        padded[: len(self.counts)] = self.counts
        shares = padded[: width * bins].reshape(bins, width).sum(axis=1) / self.tokens
        return np.arange(bins + 1) * width * _STEP, shares


def summarize(result: PerplexityResult) -> LossSummary:
    """Read the tokens of a run once."""
    return summarize_batches(result.batches(), result.provenance.scored_tokens)


def summarize_batches(batches: Iterable[pa.RecordBatch], tokens: int) -> LossSummary:
    """As `summarize`.

    Args:
        batches: with the columns of `PerplexityResult.batches`.
        tokens: rows in all, at least 1.
    """
    blocks = _Blocks(tokens)
    hardest = _Hardest()
    counts = np.zeros(round(_LONGEST / _STEP), dtype=np.int64)
    largest = 0.0
    kept = [(np.zeros(0, dtype=np.int64), np.zeros(0))]
    for batch in batches:
        positions = batch.column("position").to_numpy()
        losses = -batch.column("logprob").to_numpy(zero_copy_only=False).astype(np.float64)
        bins = np.clip(losses / _STEP, 0, len(counts) - 1).astype(np.int64)
        counts += np.bincount(bins, minlength=len(counts))
        largest = max(largest, float(losses.max(initial=0.0)))
        blocks.add(positions, losses)
        hardest.add(batch, losses)
        if tokens <= MOST_POINTS:
            kept.append((positions, losses))
    position, mean, low, high = blocks.arrays()
    return LossSummary(
        tokens=tokens,
        mean=blocks.total / tokens,
        median=(_rank(counts, 0.5) + 0.5) * _STEP,
        largest=largest,
        block_position=position,
        block_mean=mean,
        block_low=low,
        block_high=high,
        positions=np.concatenate([positions for positions, _ in kept]),
        losses=np.concatenate([losses for _, losses in kept]),
        counts=counts,
        hardest=hardest.tokens(),
    )


class _Blocks:
    """Consecutive tokens in blocks whose lengths differ by one token at most."""

    def __init__(self, tokens: int) -> None:
        number = max(1, min(MOST_BLOCKS, tokens // SMALLEST_BLOCK))
        self._ends: Iterator[int] = iter(
            np.linspace(0, tokens, number + 1)[1:].astype(int).tolist()
        )
        self._end, self._begin = next(self._ends), 0
        self._positions = np.zeros(0, dtype=np.int64)
        self._losses = np.zeros(0)
        self._rows: list[tuple[float, float, float, float]] = []
        self.total = 0.0

    def add(self, positions: np.ndarray, losses: np.ndarray) -> None:
        self.total += float(losses.sum())
        self._positions = np.concatenate([self._positions, positions])
        self._losses = np.concatenate([self._losses, losses])
        while (length := self._end - self._begin) <= len(self._losses) and length:
            block = self._losses[:length]
            low, high = np.quantile(block, [0.1, 0.9]).tolist()
            where = float(self._positions[:length].mean())
            self._rows.append((where, float(block.mean()), low, high))
            self._positions, self._losses = self._positions[length:], self._losses[length:]
            self._begin, self._end = self._end, next(self._ends, self._end)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return tuple(np.array(self._rows, dtype=np.float64).reshape(-1, 4).T)


class _Hardest:
    """The tokens with the highest losses, each with the characters before it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, HardToken]] = []
        self._order = count(0, -1)  # of equal losses the earlier token stays
        self._context = ""
        self._next_position: int | None = None

    def add(self, batch: Any, losses: np.ndarray) -> None:
        columns = (batch.column(name).to_pylist() for name in ("position", "token_id", "text"))
        for position, token, text, loss in zip(*columns, losses.tolist(), strict=True):
            if self._next_position not in (None, position):
                self._context = ""  # tokens between were not scored
            if len(self._heap) < HARDEST or loss > self._heap[0][0]:
                context = self._context[-CONTEXT_CHARACTERS:]
                entry = HardToken(position, token, text, context, loss)
                push = heapq.heappush if len(self._heap) < HARDEST else heapq.heapreplace
                push(self._heap, (loss, next(self._order), entry))
            self._context = (self._context + (text or ""))[-2 * CONTEXT_CHARACTERS :]
            self._next_position = position + 1

    def tokens(self) -> tuple[HardToken, ...]:
        return tuple(entry for *_, entry in sorted(self._heap, reverse=True))


def _rank(counts: np.ndarray, share: float) -> int:
    """The first step up to which at least this share of the tokens lies."""
    below = np.cumsum(counts)
    return int(np.searchsorted(below, share * below[-1]))
