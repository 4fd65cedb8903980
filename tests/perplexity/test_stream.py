"""Windows of a stream are the windows of the whole."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.data.tokenize import TokenChunk
from vllm.score.perplexity.windows import (
    RowWindows,
    ScoringPlan,
    SlidingWindows,
    TextStream,
    Window,
)

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=60), min_size=1, max_size=4)


def chunks(documents: list[list[int]], size: int, texts: bool = True) -> list[TokenChunk]:
    """Each document in chunks of `size` tokens; the text of token t is "<t>"."""
    found = []
    for number, ids in enumerate(documents):
        for start in range(0, max(len(ids), 1), size):
            part = ids[start : start + size]
            words = [f"<{token}>" for token in part]
            found.append(
                TokenChunk(number, part, words, "".join(words))
                if texts
                else TokenChunk(number, part, None, None)
            )
    return found


@given(DOCUMENTS, st.integers(1, 70), st.integers(2, 20), st.data())
def test_each_token_is_a_target_once_with_its_text(
    documents: list[list[int]], chunk: int, context: int, data: st.DataObject
) -> None:
    plan = SlidingWindows(context, data.draw(st.integers(1, context - 1)))
    prefix = data.draw(st.sampled_from([[], [500]]))
    stream = TextStream(chunks(documents, chunk))
    windows = list(stream.windows(ScoringPlan(plan, prefix=tuple(prefix))))
    scored = [
        (w.document, w.position + i, token, text)
        for w in windows
        for i, (token, text) in enumerate(zip(w.target_ids, w.texts or [], strict=True))
    ]
    expected, position = [], 0
    for number, ids in enumerate(documents):
        for index, token in enumerate(ids):
            if index > 0 or prefix:
                expected.append((number, position, token, f"<{token}>"))
            position += 1
    assert scored == expected
    assert [w.index for w in windows] == list(range(len(windows)))
    for w in windows:
        ids = [*prefix, *documents[w.document]]
        assert len(w.token_ids) <= context
        end = w.position - sum(map(len, documents[: w.document])) + len(prefix) + w.num_targets
        assert w.token_ids == ids[end - len(w.token_ids) : end]
    assert (stream.tokens, stream.documents) == (position, len(documents))


@given(DOCUMENTS, st.integers(1, 70), st.integers(3, 20), st.booleans())
def test_chunks_do_not_matter(
    documents: list[list[int]], chunk: int, context: int, texts: bool
) -> None:
    plan = ScoringPlan(SlidingWindows(context, 2))
    one = TextStream(chunks(documents, 1, texts))
    other = TextStream(chunks(documents, chunk, texts))
    assert list(one.windows(plan)) == list(other.windows(plan))
    assert one.sha256() == other.sha256()


def test_a_token_before_every_window() -> None:
    stream = TextStream(chunks([[1, 2, 3, 4, 5]], 2))
    plan = ScoringPlan(SlidingWindows(4, 2, reserved=1), every_window=(9,))
    windows = list(stream.windows(plan))
    assert [(w.token_ids, w.num_targets, w.position) for w in windows] == [
        ([9, 1, 2, 3], 3, 0),
        ([9, 3, 4, 5], 2, 3),
    ]


def test_a_token_in_the_place_of_each_first() -> None:
    stream = TextStream(chunks([[1, 2, 3, 4, 5, 6, 7]], 3))
    plan = ScoringPlan(RowWindows(3), prefix=(9,), replace_first=9)
    windows = list(stream.windows(plan))
    assert [(w.token_ids, w.target_ids, w.position) for w in windows] == [
        ([9, 1, 2], [1, 2], 0),
        ([9, 4, 5], [4, 5], 3),
    ]


def test_hash_is_that_of_the_text() -> None:
    text = "é 漢"
    stream = TextStream([TokenChunk(0, [1, 2], ["é", " 漢"], text)])
    list(stream.windows(ScoringPlan(SlidingWindows(8, 4))))
    assert stream.sha256() == hashlib.sha256(text.encode()).hexdigest()
    assert stream.bytes == len(text.encode())


def test_hash_of_ids_where_there_is_no_text() -> None:
    stream = TextStream(chunks([[3, 1, 2]], 2, texts=False))
    (window,) = stream.windows(ScoringPlan(SlidingWindows(8, 4)))
    assert window.texts is None
    assert stream.sha256() == hashlib.sha256(np.array([3, 1, 2], dtype="<i8")).hexdigest()


def test_a_plan_that_stops_early_still_reads_to_the_end() -> None:
    stream = TextStream(chunks([list(range(50))], 7))
    windows: list[Window] = list(stream.windows(ScoringPlan(RowWindows(5, max_rows=2))))
    assert len(windows) == 2
    assert stream.tokens == 50


def test_only_a_window_is_kept() -> None:
    produced = 0

    def endless() -> object:
        nonlocal produced
        while True:
            produced += 10
            yield TokenChunk(0, [1] * 10, None, None)

    plan = ScoringPlan(SlidingWindows(64, 16))
    windows = TextStream(endless()).windows(plan)  # type: ignore[arg-type]
    for number, window in zip(range(500), windows, strict=False):
        assert produced <= window.position + window.num_targets + 20, number
