"""Continuations of contexts: which of them share a request, and what each of them gets back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm.score import ScoreModeError, score_continuations
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


TEXTS = [
    ("The header of a message", " is read"),
    ("The header of a message", " is written"),
    ("A part in ", "the"),
    ("", "A message"),
]
IDS = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 10]), ([5, 6, 7], [8]), ([11], [12, 13, 14])]


@pytest.mark.engine
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_hugging_face(llm: Any, reference: Any, temperature: float) -> None:
    tokenizer = llm.get_tokenizer()
    pairs: list[Any] = [*TEXTS, *IDS, (np.array([5, 6, 7]), (8, 9))]
    found = score_continuations(
        llm, pairs, statistics=["entropy"], temperature=temperature, use_tqdm=False
    )
    assert [f.spans_boundary for f in found] == [i == 2 for i in range(len(pairs))]
    assert found[2].spanned_context == " "
    bos = [tokenizer.bos_token_id]
    for pair, scores in zip(pairs, found, strict=True):
        texts = isinstance(pair[0], str)
        whole = tokenizer.encode("".join(pair)) if texts else [*map(int, (*pair[0], *pair[1]))]
        ids = [*bos, *whole] if texts and not pair[0] else whole
        assert scores.token_ids is not None
        assert ids[scores.start :] == scores.token_ids.tolist()
        assert texts or scores.start == len(pair[0])
        rows = reference("llama", ids)[scores.start - 1 : -1] / temperature
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        expected = rows[np.arange(len(rows)), ids[scores.start :]]
        np.testing.assert_allclose(scores.logprobs, expected, atol=3e-5)
        assert scores.sum() == pytest.approx(expected.sum(), abs=1e-4)
        assert scores.mean() == pytest.approx(expected.mean(), abs=3e-5)
        assert scores.is_greedy == np.array_equal(rows.argmax(-1), ids[scores.start :])
        entropy = -(np.exp(rows) * rows).sum(-1)
        np.testing.assert_allclose(scores.statistics["entropy"], entropy, atol=1e-4)
    assert found[4].logprobs.tolist() == found[-1].logprobs.tolist()


@pytest.mark.engine
def test_the_likeliest_tokens_are_greedy_and_statistics_are_those_of_each(
    llm: Any, reference: Any
) -> None:
    context = [5, 6, 7]
    first = int(reference("llama", context)[-1].argmax())
    row = reference("llama", [*context, first])[-1]
    order = np.argsort(-row)
    pairs = [(context, [first, int(token)]) for token in order[:3]]
    found = score_continuations(llm, pairs, statistics=["rank", "argmax"], use_tqdm=False)
    assert [f.is_greedy for f in found] == [True, False, False]
    assert [f.statistics["rank"].tolist() for f in found] == [[1, 1], [1, 2], [1, 3]]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ("ab", {}, "^pairs is str; give a list"),
        ([("a", "b"), "ab"], {}, r"^pairs\[1\] is 'ab'"),
        ([([5], "b")], {}, r"^pairs\[0\], sequence must be a list of token ids, got str"),
        ([("a", [5])], {}, r"^pairs\[0\], sequence is list; give a text"),
        ([([5], [])], {}, r"^pairs\[0\], sequence has no tokens"),
        ([([], [5])], {}, r"^pairs\[0\], context has no messages and no token ids"),
        ([([5], [1 << 40])], {}, r"^pairs\[0\], sequence\[0\] is \d+, outside the vocabulary"),
        ([([5] * 2048, [5])], {}, r"^pairs\[0\]: 2049 tokens together"),
        ([("a", "b")], {"boundary": "loose"}, "^boundary 'loose' is unknown; there are spanning"),
        ([("a", "b")], {"statistics": ["entropi"]}, "entropi"),
        ([("a", "b")], {"lora_request": [None, None]}, "2 entries for 1 pairs"),
    ],
    ids=str,
)
def test_pairs_that_cannot_be_scored_are_named(
    llm: Any, pairs: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScoreModeError, match=message):
        score_continuations(llm, pairs, use_tqdm=False, **options)
