"""Standard error of a mean whose terms are correlated with their neighbours: block bootstrap.

The losses of neighbouring tokens are not independent (one hard passage is many hard tokens), so
std / sqrt(n) is too small. The circular block bootstrap (Politis and Romano 1992; Künsch 1989 for
moving blocks) resamples whole blocks of b neighbouring terms from the series closed to a circle.
Its variance of the mean of k = n / b blocks needs no random numbers: it is the variance of the
block means over all n starting points, divided by k. The percentile interval does draw, with a
fixed seed.

Block length: the automatic rule of Politis and White (2004) for the circular bootstrap with the
correction of Patton, Politis and White (2009),

    b = (2 G^2 / D)^(1/3) n^(1/3),  G = sum over k of w(k/M) |k| R(k),  D = 4/3 g(0)^2,
    g(0) = sum over k of w(k/M) R(k),  w flat-top: 1 up to 1/2, then falling linearly to 0 at 1,

R(k) the autocovariance at lag k, M = 2 m, m the first lag after which K = max(5, log10 n)
autocorrelations in a row are within 2 sqrt(log10(n) / n) of zero; at most min(3 sqrt(n), n / 3).

Memory is bounded: beyond `max_cells` terms, neighbours are added up into cells of 2, 4, 8 ... and
blocks start at cells only; the autocovariances come from the first 2^20 terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vllm.score.errors import ScoreModeError

MINIMUM_TERMS = 30  # below, the estimate of a correlation says nothing
_AUTOCOVARIANCE_TERMS = 1 << 20
_MOST_BLOCKS = 4096


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its block-bootstrap error.

    standard_error, interval: None below `MINIMUM_TERMS` terms.
    block_length: terms per block, a multiple of the cell size.
    interval: (low, high), percentiles of the resampled means.
    """

    mean: float
    standard_error: float | None
    block_length: int | None
    interval: tuple[float, float] | None


class BlockBootstrap:
    """Collects a series piece by piece, then gives the error of its mean.

    Args:
        max_cells: sums kept in memory (float64 each), an even number.
    """

    def __init__(self, max_cells: int = 1 << 22) -> None:
        self._cells = np.zeros(max_cells)  # each the sum of so many terms:
        self._cell_size = 1
        self._head: list[np.ndarray] = []
        self.terms = 0

    def add(self, values: np.ndarray) -> None:
        """The next terms of the series: float [m]."""
        values = np.asarray(values, dtype=np.float64)
        if (wanted := _AUTOCOVARIANCE_TERMS - self.terms) > 0:
            self._head.append(values[:wanted].copy())
        begin, self.terms = self.terms, self.terms + values.size
        while self.terms > self._cells.size * self._cell_size:
            pairs = self._cells.reshape(-1, 2).sum(axis=1)
            self._cells = np.concatenate([pairs, np.zeros_like(pairs)])
            self._cell_size *= 2
        np.add.at(self._cells, np.arange(begin, self.terms) // self._cell_size, values)

    def estimate(self, *, resamples: int = 2000, seed: int = 0) -> MeanEstimate:
        """Mean, standard error and 95 % percentile interval of the terms added so far.

        Raises:
            ScoreModeError: with no terms.
        """
        if self.terms == 0:
            raise ScoreModeError("no terms: there is no mean to estimate")
        mean = float(self._cells.sum()) / self.terms
        if self.terms < MINIMUM_TERMS:
            return MeanEstimate(mean, None, None, None)
        # The terms of an incomplete last cell count in the mean, not in its error.
        cells = self._cells[: self.terms // self._cell_size]
        length = optimal_block_length(np.concatenate(self._head), self.terms)
        cells_per_block = min(max(1, round(length / self._cell_size)), cells.size)
        block_length = cells_per_block * self._cell_size
        deviations = _block_means(cells / self._cell_size, cells_per_block)
        deviations -= deviations.mean()
        blocks = self.terms / block_length
        error = math.sqrt(float(np.mean(np.square(deviations))) / blocks)
        draws = _resampled_means(deviations, max(1, round(blocks)), resamples, seed)
        low, high = mean + np.quantile(draws, [0.025, 0.975])
        return MeanEstimate(mean, error, block_length, (float(low), float(high)))


def optimal_block_length(head: np.ndarray, terms: int | None = None) -> float:
    """Politis and White's block length for the mean under the circular bootstrap.

    Args:
        head: float [h], the first terms of the series.
        terms: length of the whole series, if `head` is only its beginning.

    Returns:
        at least 1; 1 for a constant series.
    """
    values = np.asarray(head, dtype=np.float64)
    count, terms = values.size, terms or values.size
    if count < 2 or not np.ptp(values):
        return 1.0
    in_a_row = max(5, math.ceil(math.log10(count)))
    max_lag = min(math.ceil(math.sqrt(count)) + in_a_row, count - 1)
    covariances = _autocovariances(values, min(2 * max_lag, count - 1))
    small = np.abs(covariances[1 : max_lag + 1]) < (
        2 * math.sqrt(math.log10(count) / count) * covariances[0]
    )
    last_lag = _first_quiet_lag(small, in_a_row)
    window = min(2 * max(last_lag, 1), covariances.size - 1)
    lags = np.arange(1, window + 1)
    weights = np.minimum(1.0, 2 * (1 - lags / window)) * covariances[1 : window + 1]
    spread = 2 * float(np.sum(weights * lags))
    long_run = float(covariances[0]) + 2 * float(np.sum(weights))
    limit = min(3 * math.sqrt(terms), terms / 3)
    if long_run == 0:
        return max(1.0, limit)
    length = (1.5 * (spread / long_run) ** 2 * terms) ** (1 / 3)
    return float(min(max(length, 1.0), max(limit, 1.0)))


def _first_quiet_lag(small: np.ndarray, in_a_row: int) -> int:
    """The last lag before the first `in_a_row` insignificant ones (small[i] is lag i + 1)."""
    quiet = np.lib.stride_tricks.sliding_window_view(small, min(in_a_row, small.size)).all(axis=-1)
    if small.size >= in_a_row and quiet.any():
        return int(quiet.argmax())
    loud = np.flatnonzero(~small)
    return int(loud[-1]) + 1 if loud.size else 0


def _autocovariances(values: np.ndarray, max_lag: int) -> np.ndarray:
    """R(0..max_lag), divided by n as in the cited papers."""
    from scipy import fft

    centred = values - values.mean()
    size = fft.next_fast_len(values.size + max_lag, real=True)
    spectrum = fft.rfft(centred, size)
    power = np.square(spectrum.real) + np.square(spectrum.imag)
    return fft.irfft(power, size)[: max_lag + 1] / values.size


def _block_means(cells: np.ndarray, length: int) -> np.ndarray:
    """Mean of the circular block of `length` cells from every cell on."""
    circle = np.concatenate([[0.0], np.cumsum(np.concatenate([cells, cells[: length - 1]]))])
    return (circle[length:] - circle[:-length]) / length


def _resampled_means(means: np.ndarray, blocks: int, resamples: int, seed: int) -> np.ndarray:
    """Means of `blocks` block means drawn with replacement, `resamples` times.

    Beyond `_MOST_BLOCKS` fewer are drawn and the result is scaled to the same variance: the mean
    of so many blocks is normal enough for the rest not to matter.
    """
    random = np.random.default_rng(seed)
    drawn = min(blocks, _MOST_BLOCKS)
    draws = [means[random.integers(0, means.size, drawn)].mean() for _ in range(resamples)]
    return np.array(draws) * math.sqrt(drawn / blocks)
