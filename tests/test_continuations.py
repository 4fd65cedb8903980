"""Continuations of contexts: which of them share a request, and what each of them gets back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm.score.continuations import MergedContinuations
from vllm.score.results import TokenScores

Pairs = list[tuple[list[int], list[int]]]

token = st.integers(0, 3)
pair = st.tuples(st.lists(token, min_size=1, max_size=4), st.lists(token, min_size=1, max_size=3))


def logprob_of(prefix: list[int], target: int) -> float:
    """Tells prefix and token apart."""
    return -float(sum((i + 2) * (t + 1) for i, t in enumerate([*prefix, target])))


def likeliest(prefix: list[int]) -> int:
    return max(range(4), key=lambda t: ((sum(prefix) + 3 * t) % 5, -t))


def answer(request: dict[str, Any]) -> TokenScores:
    ids, targets = request["prompt_token_ids"], request["target_token_ids"]
    starts = range(len(ids) - len(targets), len(ids))
    rows = [[logprob_of(ids[:i], t) for t in row] for i, row in zip(starts, targets, strict=True)]
    argmax = np.array([likeliest(ids[:i]) for i in starts])
    return TokenScores(np.array(targets), np.float32(rows), {"argmax": argmax}, start=starts[0])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(pair, max_size=12), st.sampled_from([1, 2, 3, float("inf")]))
def test_merged_requests_lead_back_to_every_pair(pairs: Pairs, width: float) -> None:
    merged = MergedContinuations(pairs, width=width)
    lasts: dict[tuple[int, ...], set[int]] = {}
    for context, continuation in pairs:
        *body, last = *context, *continuation
        lasts.setdefault(tuple(body), set()).add(last)
    assert len(merged.requests) == sum(-(-len(each) // min(width, 4)) for each in lasts.values())
    assert all(len(request["target_token_ids"][0]) <= width for request in merged.requests)
    found = merged.scores([answer(request) for request in merged.requests])
    for (context, continuation), scores in zip(pairs, found, strict=True):
        ids = [*context, *continuation]
        places = range(len(context), len(ids))
        assert scores.token_ids is not None and scores.token_ids.tolist() == continuation
        assert scores.logprobs.tolist() == [logprob_of(ids[:i], ids[i]) for i in places]
        assert scores.sum() == scores.logprobs.sum() == pytest.approx(scores.mean() * len(scores))
        assert scores.is_greedy == all(likeliest(ids[:i]) == ids[i] for i in places)
        assert (scores.start, len(scores)) == (len(context), len(continuation))


def test_continuations_that_differ_in_the_last_token_are_candidates_of_one_request() -> None:
    pairs = [([5, 6], [1]), ([5, 6], [1, 2]), ([5, 6], [2]), ([5, 6], [1]), ([5], [6, 3])]
    merged = MergedContinuations(pairs)
    assert merged.requests == [
        {"prompt_token_ids": [5, 6, 1], "target_token_ids": [[6, 6, 6], [1, 2, 3]]},
        {"prompt_token_ids": [5, 6, 1, 2], "target_token_ids": [[1], [2]]},
    ]
    assert [place.request for place in merged.places] == [0, 1, 0, 0, 0]
    assert MergedContinuations([]).requests == []


def test_adapters_share_no_request() -> None:
    pairs = [([5], [1]), ([5], [2]), ([5], [3])]
    merged = MergedContinuations(pairs, adapters=["a", None, "a"])
    assert [r["target_token_ids"] for r in merged.requests] == [[[1, 3]], [[2]]]
    assert merged.adapters == ["a", None]
