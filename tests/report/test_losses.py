"""The losses of a run: where they are, which are high, how they are distributed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.report import plots
from vllm.score.report.plots import losses_of


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
    table = table_of(logprobs)
    ends = sorted({min(cut, tokens) for cut in cuts} | {tokens})
    pieces = [table.slice(begin, end - begin) for begin, end in pairwise([0, *ends])]
    found = losses_of(pa.concat_tables(pieces))
    assert found.nats.tolist() == losses.tolist()
    assert found.positions.tolist() == list(range(1, tokens + 1))

    order = np.argsort(-losses, kind="stable")[: plots.HARDEST]
    assert [token.position for token in found.hardest] == (order + 1).tolist()
    assert [token.loss for token in found.hardest] == losses[order].tolist()
    for token in found.hardest:
        before = "".join(f"t{position} " for position in range(1, token.position))
        assert token.context == before[-plots.CONTEXT_CHARACTERS :]
        assert token.text == f"t{token.position} "
        assert token.token_id == 2 * token.position


@pytest.mark.parametrize("tokens", [1, 15, 31, 32, 33, 3199, 3200, 3217, 8999])
def test_blocks_hold_each_token_once(tokens):
    losses = losses_of(table_of(some_logprobs(tokens, seed=0)))
    positions, nats = zip(*losses.blocks(), strict=True)
    assert len(nats) == max(1, min(plots.MOST_BLOCKS, tokens // plots.SMALLEST_BLOCK))
    lengths = {len(block) for block in nats}
    assert max(lengths) - min(lengths) <= 1
    assert np.concatenate(nats).tolist() == losses.nats.tolist()
    assert np.concatenate(positions).tolist() == losses.positions.tolist()


@settings(deadline=None, max_examples=40)
@given(tokens=st.integers(1, 5000), seed=st.integers(0, 9), bins=st.integers(1, 80))
def test_the_histogram_counts_the_tokens(tokens, seed, bins):
    logprobs = some_logprobs(tokens, seed)
    losses = -logprobs.astype(np.float64)
    edges, shares = losses_of(table_of(logprobs)).histogram(bins)

    assert len(edges) == bins + 1 and edges[0] == 0
    found = [np.count_nonzero((losses >= low) & (losses < high)) for low, high in pairwise(edges)]
    # A loss within rounding of an edge may fall to either side.
    assert np.abs(np.cumsum(shares) * tokens - np.cumsum(found)).max() < 1.5
    assert round(shares.sum() * tokens) >= 0.999 * tokens


def test_a_few_far_out_do_not_stretch_the_histogram():
    logprobs = np.concatenate([some_logprobs(20_000, seed=1), [-90.0, -99.99, -250.0]])
    edges, shares = losses_of(table_of(logprobs)).histogram()
    assert edges[-1] < 30
    assert 0 < 1 - shares.sum() < 1e-3


def test_certain_tokens_have_a_histogram_too():
    edges, shares = losses_of(table_of(np.array([0.0, 1e-6]))).histogram(10)
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
    assert [(token.text, token.context) for token in losses_of(table).hardest] == [
        (None, "five "),
        ("five ", ""),
        ("two ", "one "),
        ("one ", ""),
    ]


@pytest.mark.engine
def test_of_a_run(result: Any, expected: Any) -> None:
    losses = losses_of(result.tokens())
    assert losses.positions.tolist() == expected.positions.tolist()
    assert losses.nats == pytest.approx(expected.losses, abs=5e-5)
    highest = np.sort(expected.losses)[::-1][: plots.HARDEST]
    assert [token.loss for token in losses.hardest] == pytest.approx(highest, abs=5e-5)
    for token in losses.hardest:
        assert expected.losses[token.position - 1] == pytest.approx(token.loss, abs=5e-5)
        assert expected.token_ids[token.position - 1] == token.token_id
