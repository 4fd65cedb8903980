"""The losses of a run: where they are, which are high, how they are distributed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.report import plots
from vllm.score.report.plots import Losses, losses_of, quantiles


def table_of(logprobs: np.ndarray) -> pa.Table:
    """Tokens 1, 2, ... of a text "t1 t2 ..."."""
    positions = np.arange(1, len(logprobs) + 1)
    return pa.table(
        {
            "position": positions,
            "token_id": positions * 2,
            "text": [f"t{position} " for position in positions],
            "logprob": logprobs.astype(np.float32),
            "window": positions // 5,
        }
    )


def losses_in(logprobs: np.ndarray, cuts: Iterable[int] = ()) -> Losses:
    """Of batches that end at `cuts`."""
    table, tokens = table_of(logprobs), len(logprobs)
    ends = sorted({min(cut, tokens) for cut in cuts} | {tokens})
    pieces = [table.slice(begin, end - begin) for begin, end in pairwise([0, *ends])]
    return losses_of((batch for piece in pieces for batch in piece.to_batches()), tokens)


def some_logprobs(tokens: int, seed: int) -> np.ndarray:
    return -np.random.default_rng(seed).gamma(1.2, 2.0, tokens).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 5000),
    cuts=st.lists(st.integers(1, 5000), max_size=6),
    seed=st.integers(0, 99),
)
def test_equal_to_numpy_however_the_tokens_are_cut(tokens, cuts, seed):
    logprobs = some_logprobs(tokens, seed)
    losses = -logprobs.astype(np.float64)
    found = losses_in(logprobs, cuts)
    assert found.mean == pytest.approx(losses.mean(), rel=1e-12)
    shares = [0, 0.1, 0.5, 0.9, 1]
    middle = quantiles(found.counts.sum(axis=0), shares)
    assert middle == pytest.approx(np.quantile(losses, shares), abs=1e-3)
    if tokens <= plots.MOST_POINTS:
        assert found.single.tolist() == [list(range(1, tokens + 1)), losses.tolist()]
    else:
        assert found.single.size == 0

    order = np.argsort(-losses, kind="stable")[: plots.HARDEST]
    assert [token.position for token in found.hardest] == (order + 1).tolist()
    assert [token.loss for token in found.hardest] == losses[order].tolist()
    for token in found.hardest:
        before = "".join(f"t{position} " for position in range(1, token.position))
        assert token.context == before[-plots.CONTEXT_CHARACTERS :]
        assert token.text == f"t{token.position} "
        assert token.token_id == 2 * token.position


@pytest.mark.parametrize("tokens", [1, 15, 31, 32, 33, 3199, 3200, 3217, 8999])
@pytest.mark.parametrize("cut", [64, 1000, 9000])
def test_blocks_hold_each_token_once(tokens, cut):
    logprobs = some_logprobs(tokens, seed=0)
    found = losses_in(logprobs, range(cut, tokens, cut))
    number = max(1, min(plots.MOST_BLOCKS, tokens // plots.SMALLEST_BLOCK))
    ends = np.linspace(0, tokens, number + 1).astype(int)
    assert found.counts.sum(axis=1).tolist() == np.diff(ends).tolist()
    assert np.ptp(np.diff(ends)) <= 1
    for block, (begin, end) in enumerate(pairwise(ends)):
        nats = -logprobs[begin:end].astype(np.float64)
        assert found.sums[:, block] == pytest.approx([sum(range(begin + 1, end + 1)), nats.sum()])
        spread = quantiles(found.counts[block], [0.1, 0.9])
        assert spread == pytest.approx(np.quantile(nats, [0.1, 0.9]), abs=1e-3)


def test_memory_is_bounded_whatever_the_number_of_tokens():
    size, numbers = 20_000, (10, 100)
    batch = table_of(some_logprobs(size, seed=0)).to_batches()[0]

    def batches(number: int) -> Iterator[pa.RecordBatch]:
        for part in range(number):
            positions = pa.array(np.arange(part * size, (part + 1) * size))
            assert pa.total_allocated_bytes() - held < 4 * batch.nbytes
            yield batch.set_column(0, "position", positions)

    most, held = [], pa.total_allocated_bytes()
    for number in numbers:
        tracemalloc.start()
        found = losses_of(batches(number), number * size)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.counts.sum() == number * size
        kept = [found.counts, found.sums, found.single]
        assert sum(array.nbytes for array in kept) <= 81e6
        assert len(found.hardest) == plots.HARDEST
    assert most[1] < most[0] + 1e6  # ten times the tokens


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 5000), seed=st.integers(0, 9), bins=st.integers(1, 80))
def test_the_histogram_counts_the_tokens(tokens, seed, bins):
    logprobs = some_logprobs(tokens, seed)
    losses = -logprobs.astype(np.float64)
    edges, shares = losses_in(logprobs).histogram(bins)

    assert len(edges) == bins + 1 and edges[0] == 0
    found = [np.count_nonzero((losses >= low) & (losses < high)) for low, high in pairwise(edges)]
    # A loss within rounding of an edge may fall to either side.
    assert np.abs(np.cumsum(shares) * tokens - np.cumsum(found)).max() < 1.5
    assert round(shares.sum() * tokens) >= 0.999 * tokens


def test_a_few_far_out_do_not_stretch_the_histogram():
    logprobs = np.concatenate([some_logprobs(20_000, seed=1), [-90.0, -99.99, -250.0]])
    edges, shares = losses_in(logprobs).histogram()
    assert edges[-1] < 30
    assert 0 < 1 - shares.sum() < 1e-3


def test_certain_tokens_have_a_histogram_too():
    edges, shares = losses_in(np.array([0.0, 1e-6])).histogram(10)
    assert edges[-1] > 0
    assert shares.tolist() == [1, *[0] * 9]


def test_tokens_that_were_not_scored_end_a_context():
    table = pa.table(
        {
            "position": [1, 2, 5, 6],
            "token_id": [1, 2, 5, 6],
            "text": ["one ", "two ", "five ", None],
            "logprob": np.array([-1, -2, -3, -4], dtype=np.float32),
            "window": [0, 0, 1, 1],
        }
    )
    found = losses_of(table.to_batches(max_chunksize=1), 4).hardest
    assert [(token.text, token.context) for token in found] == [
        (None, "five "),
        ("five ", ""),
        ("two ", "one "),
        ("one ", ""),
    ]


@pytest.mark.engine
def test_of_a_run(result: Any, expected: Any) -> None:
    losses = losses_of(result.batches(), len(expected.losses))
    positions, nats = losses.single
    assert positions.tolist() == expected.positions.tolist()
    assert nats == pytest.approx(expected.losses, abs=5e-5)
    highest = np.sort(expected.losses)[::-1][: plots.HARDEST]
    assert [token.loss for token in losses.hardest] == pytest.approx(highest, abs=5e-5)
    for token in losses.hardest:
        assert expected.losses[token.position - 1] == pytest.approx(token.loss, abs=5e-5)
        assert expected.token_ids[token.position - 1] == token.token_id
