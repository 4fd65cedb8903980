"""The losses in short, against numpy over all of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.report import losses as module
from vllm.score.report.losses import LossSummary, summarize, summarize_batches


def batches(logprobs: np.ndarray, cuts: list[int]) -> list[pa.RecordBatch]:
    """Tokens 1, 2, ... of a text "t1 t2 ...", in batches that end at `cuts`."""
    positions = np.arange(1, len(logprobs) + 1)
    table = pa.table(
        {
            "position": positions,
            "token_id": positions * 2,
            "text": [f"t{position} " for position in positions],
            "logprob": logprobs.astype(np.float32),
            "window": positions // 5,
        }
    )
    ends = sorted({min(cut, len(logprobs)) for cut in cuts} | {len(logprobs)})
    starts = [0, *ends[:-1]]
    return [
        batch
        for start, end in zip(starts, ends, strict=True)
        for batch in table.slice(start, end - start).to_batches()
    ]


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
    summary = summarize_batches(batches(logprobs, cuts), tokens)

    assert summary.mean == pytest.approx(losses.mean(), rel=1e-12)
    lower_median = np.sort(losses)[(tokens - 1) // 2]
    assert summary.median == pytest.approx(lower_median, abs=1e-3)
    assert summary.largest == losses.max()

    order = np.argsort(-losses, kind="stable")[: module.HARDEST]
    assert [token.position for token in summary.hardest] == (order + 1).tolist()
    assert [token.loss for token in summary.hardest] == losses[order].tolist()
    for token in summary.hardest:
        before = "".join(f"t{position} " for position in range(1, token.position))
        assert token.context == before[-module.CONTEXT_CHARACTERS :]
        assert token.text == f"t{token.position} "
        assert token.token_id == 2 * token.position


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 9000), cut=st.integers(1, 9000))
def test_blocks_hold_each_token_once(tokens, cut):
    logprobs = some_logprobs(tokens, seed=0)
    losses = -logprobs.astype(np.float64)
    summary = summarize_batches(batches(logprobs, [cut]), tokens)

    parts = np.array_split(losses, len(summary.block_mean))
    assert len(parts) == max(1, min(module.MOST_BLOCKS, tokens // module.SMALLEST_BLOCK))
    lengths = {len(part) for part in parts}
    assert max(lengths) - min(lengths) <= 1
    # array_split puts the longer parts first, the summary spreads them: compare what must agree.
    begins = np.linspace(0, tokens, len(parts) + 1).astype(int)
    for index, (begin, end) in enumerate(pairwise(begins)):
        block = losses[begin:end]
        assert summary.block_mean[index] == pytest.approx(block.mean(), rel=1e-12)
        assert summary.block_low[index] == pytest.approx(np.percentile(block, 10), rel=1e-12)
        assert summary.block_high[index] == pytest.approx(np.percentile(block, 90), rel=1e-12)
        assert summary.block_position[index] == pytest.approx(1 + (begin + end - 1) / 2)
    if tokens <= module.MOST_POINTS:
        assert summary.losses.tolist() == losses.tolist()
    else:
        assert summary.losses.size == 0


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 5000), seed=st.integers(0, 9), bins=st.integers(1, 80))
def test_the_histogram_is_numpys(tokens, seed, bins):
    logprobs = some_logprobs(tokens, seed)
    losses = -logprobs.astype(np.float64)
    edges, shares = summarize_batches(batches(logprobs, []), tokens).histogram(bins)

    assert len(edges) == bins + 1
    found = [np.count_nonzero((losses >= low) & (losses < high)) for low, high in pairwise(edges)]
    # A loss within rounding of an edge may fall to either side.
    assert np.abs(np.cumsum(shares) * tokens - np.cumsum(found)).max() <= 1
    assert round(shares.sum() * tokens) >= 0.999 * tokens


def test_a_few_far_out_do_not_stretch_the_histogram():
    logprobs = np.concatenate([some_logprobs(20_000, seed=1), [-90.0, -99.99, -250.0]])
    summary = summarize_batches(batches(logprobs, []), len(logprobs))
    edges, shares = summary.histogram()
    assert edges[-1] < 30
    assert summary.largest == 250
    assert 0 < 1 - shares.sum() < 1e-3


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
    hardest = summarize_batches(table.to_batches(), 4).hardest
    assert [(token.text, token.context) for token in hardest] == [
        (None, "five "),
        ("five ", ""),
        ("two ", "one "),
        ("one ", ""),
    ]


@pytest.mark.engine
def test_of_a_run(result: Any, expected: Any) -> None:
    summary = summarize(result)
    assert isinstance(summary, LossSummary)
    assert summary.tokens == len(expected.losses)
    assert summary.mean == pytest.approx(expected.losses.mean(), rel=1e-6)
    assert summary.positions.tolist() == expected.positions.tolist()
    assert summary.losses == pytest.approx(expected.losses, abs=5e-5)
    highest = np.sort(expected.losses)[::-1][: module.HARDEST]
    assert [token.loss for token in summary.hardest] == pytest.approx(highest, abs=5e-5)
    for token in summary.hardest:
        assert expected.losses[token.position - 1] == pytest.approx(token.loss, abs=5e-5)
        assert expected.token_ids[token.position - 1] == token.token_id
