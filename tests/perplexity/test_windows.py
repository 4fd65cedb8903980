"""Window plans against loops written from the tools' own descriptions."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.windows import (
    RollingWindows,
    RowWindows,
    SlidingWindows,
    Span,
    WindowPlan,
)

LENGTHS = st.integers(0, 200)


@st.composite
def sliding(draw: st.DrawFn) -> SlidingWindows:
    context = draw(st.integers(2, 40))
    return SlidingWindows(context, draw(st.integers(1, context)))


def spans(plan: WindowPlan, length: int, lead: int = 0) -> list[Span]:
    return list(plan.spans(lambda wanted: min(wanted, length), lead=lead))


def targets(plan: WindowPlan, length: int, lead: int = 0) -> list[int]:
    return [t for s in spans(plan, length, lead) for t in range(s.first_target, s.end)]


def guide(length: int, context: int, stride: int) -> list[tuple[int, int, list[int]]]:
    """Hugging Face's guide: labels that are not masked and survive the shift by one."""
    windows = []
    previous_end = 0
    for begin in range(0, length, stride):
        end = min(begin + context, length)
        target_length = end - previous_end
        kept = range(max(end - target_length, begin + 1), end)
        windows.append((begin, end, list(kept)))
        previous_end = end
        if end == length:
            break
    return [window for window in windows if window[2]]


@given(sliding(), LENGTHS)
def test_sliding_windows_are_those_of_the_guide(plan: SlidingWindows, length: int) -> None:
    found = [(s.begin, s.end, list(range(s.first_target, s.end))) for s in spans(plan, length)]
    assert found == guide(length, plan.context_length, plan.stride)


@given(sliding(), LENGTHS, st.integers(0, 3))
def test_sliding_scores_each_token_once(plan: SlidingWindows, length: int, lead: int) -> None:
    found = targets(plan, length, lead)
    assert len(found) == len(set(found))
    if plan.covers_everything:
        assert found == list(range(max(lead, 1), length))
    else:
        starts = range(0, length, plan.context_length)
        assert found == [i for i in range(max(lead, 1), length) if i not in starts]


@given(st.integers(3, 40), st.data(), LENGTHS)
def test_a_bos_a_window_leaves_no_token_out(size: int, data: st.DataObject, length: int) -> None:
    plan = SlidingWindows(size, data.draw(st.integers(1, size)), reserved=1)
    assert targets(plan, length) == list(range(length))
    assert all(s.end - s.begin + 1 <= size for s in spans(plan, length))


@given(sliding(), LENGTHS)
def test_sliding_context_is_at_least_the_overlap(plan: SlidingWindows, length: int) -> None:
    for span in spans(plan, length)[1:]:
        assert span.first_target - span.begin >= max(1, plan.context_length - plan.stride)
        assert span.end - span.first_target <= plan.stride


def test_last_window_keeps_the_grid() -> None:
    assert spans(SlidingWindows(8, 3), 12) == [Span(0, 8, 1), Span(3, 11, 8), Span(6, 12, 11)]
    assert spans(SlidingWindows(8, 3), 11) == [Span(0, 8, 1), Span(3, 11, 8)]
    assert spans(SlidingWindows(8, 3), 1) == []


@given(st.integers(3, 40), st.integers(0, 300))
def test_gptq_rows(size: int, length: int) -> None:
    plan = RowWindows(size)
    if length < size:
        with pytest.raises(ScoreModeError, match=f"only {length} tokens"):
            targets(plan, length)
        return
    expected = [i for i in range(length // size * size) if i % size != 0]
    assert targets(plan, length) == expected


@given(st.integers(3, 40), st.integers(0, 300))
def test_llama_cpp_rows(n_ctx: int, length: int) -> None:
    plan = RowWindows(n_ctx, first_scored=n_ctx // 2 + 1, min_rows=2)
    if length < 2 * n_ctx:
        with pytest.raises(ScoreModeError, match=f"need at least {2 * n_ctx}"):
            targets(plan, length)
        return
    expected = []
    for chunk in range(length // n_ctx):
        # logits of the positions first .. n_ctx - 2 predict the token after each
        first = n_ctx // 2
        expected += [chunk * n_ctx + position + 1 for position in range(first, n_ctx - 1)]
    assert targets(plan, length) == expected


@given(st.integers(3, 20), st.integers(0, 300), st.integers(1, 8))
def test_exllamav3_rows(size: int, length: int, rows: int) -> None:
    plan = RowWindows(size, drop_last_if_exact=True, max_rows=rows)
    begins = list(range(0, length - size, size))[:rows]
    if not begins:
        with pytest.raises(ScoreModeError, match="tokens"):
            targets(plan, length)
        return
    assert spans(plan, length) == [Span(b, b + size, b + 1) for b in begins]


def rolling(tokens: list[int], prefix: int, max_seq_len: int) -> list[tuple[list[int], list[int]]]:
    """lm-eval: predictions in runs of max_seq_len; the model reads max_seq_len tokens before each
    prediction's end; tokens predicted in the same window are no context of its first."""
    windows = []
    for begin in range(0, len(tokens), max_seq_len):
        predicted = tokens[begin : begin + max_seq_len]
        before = [prefix, *tokens][: begin + len(predicted)][-max_seq_len:]
        windows.append((before[: len(before) - len(predicted) + 1], predicted))
    return windows


@given(st.integers(1, 30), st.integers(0, 200))
def test_rolling_windows_of_lm_eval(max_seq_len: int, length: int) -> None:
    tokens = list(range(100, 100 + length))
    stream = [7, *tokens]
    found = [
        (stream[s.begin : s.first_target], stream[s.first_target : s.end])
        for s in spans(RollingWindows(max_seq_len + 1), len(stream), lead=1)
    ]
    assert found == rolling(tokens, 7, max_seq_len)


PLANS = st.one_of(
    sliding(),
    st.integers(2, 30).map(RollingWindows),
    st.builds(RowWindows, st.integers(3, 30), max_rows=st.none() | st.integers(1, 4)),
)


@given(PLANS, st.integers(30, 200))
def test_spans_move_forward_and_have_context(plan: WindowPlan, length: int) -> None:
    found = spans(plan, length)
    for before, after in pairwise(found):
        assert before.begin < after.begin and before.end <= after.first_target
    for span in found:
        assert span.begin < span.first_target < span.end <= length
        assert span.end - span.begin <= plan.context_length
