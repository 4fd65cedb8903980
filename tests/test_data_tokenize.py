"""A text in pieces has the tokens of the whole text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import (
    ODD,
    PROSE,
    byte_level,
    byte_level_with_bos,
    odd_texts,
    other_tokenizers,
)
from tests.sequence.tokenizers import WithoutOffsets, metaspace
from vllm.score.data.tokenize import (
    TokenChunk,
    limit_tokens,
    tokenize_documents,
)
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import automatic_prefix

# Small enough that a text of a few thousand characters has many blocks.
SMALL = {"block": 600, "overlap": 256}
TOKENIZERS = ["byte level", *other_tokenizers()]


def tokenizer_named(name: str) -> Any:
    return byte_level() if name == "byte level" else other_tokenizers()[name]


def whole(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chunks_of(tokenizer: Any, text: str, **sizes: int) -> list[TokenChunk]:
    return list(tokenize_documents(tokenizer, [(0, text)], **{**SMALL, **sizes}))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=odd_texts())
@settings(max_examples=25, deadline=None)
def test_stream_equals_whole(name: str, text: str) -> None:
    tokenizer = tokenizer_named(name)
    chunks = chunks_of(tokenizer, text)
    ids = [token for chunk in chunks for token in chunk.ids]
    assert ids == whole(tokenizer, text)
    assert "".join(chunk.text or "" for chunk in chunks) == text
    if ids:
        assert "".join(t for chunk in chunks for t in chunk.texts or []) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prose_goes_through_in_many_blocks(name: str) -> None:
    tokenizer = tokenizer_named(name)
    text = PROSE[:50_000]
    chunks = chunks_of(tokenizer, text)
    assert [token for chunk in chunks for token in chunk.ids] == whole(tokenizer, text)
    if name == "unigram over spaces":
        assert len(chunks) == 1  # no place to cut is safe
    else:
        assert len(chunks) > 40  # else nothing was shown about going over


@pytest.mark.parametrize(
    "text",
    ["a" * 8_000, "1" * 8_001, " " * 8_000, "漢" * 3_000, "x" * 4_000 + " " + "y" * 4_000],
    ids=["letters", "digits", "spaces", "no spaces", "two words"],
)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_monotonous_texts(name: str, text: str) -> None:
    tokenizer = tokenizer_named(name)
    ids = [token for chunk in chunks_of(tokenizer, text) for token in chunk.ids]
    assert ids == whole(tokenizer, text)


@given(odd_texts(600), st.lists(st.integers(0, 3000), max_size=6))
@settings(deadline=None)
def test_chunks_do_not_depend_on_the_pieces(text: str, cuts: list[int]) -> None:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [(0, text[a:b]) for a, b in pairwise(bounds)]
    tokenizer = byte_level()
    assert list(tokenize_documents(tokenizer, pieces, **SMALL)) == chunks_of(tokenizer, text)


def test_little_is_read_ahead() -> None:
    read = 0

    def pieces() -> Iterator[tuple[int, str]]:
        nonlocal read
        for _ in range(10_000):
            read += 100
            yield 0, "some words. " * 8 + "end\n"

    stream = tokenize_documents(byte_level(), pieces(), **SMALL)
    next(stream)
    assert read < 10 * SMALL["block"]


def test_documents_stay_apart() -> None:
    tokenizer = byte_level()
    pieces = [(0, "one "), (0, "two"), (1, ""), (2, "three")]
    chunks = list(tokenize_documents(tokenizer, pieces))
    assert [(c.document, c.ids, c.text) for c in chunks] == [
        (0, whole(tokenizer, "one two"), "one two"),
        (1, [], ""),
        (2, whole(tokenizer, "three"), "three"),
    ]


def test_a_character_of_several_tokens_stands_with_the_first() -> None:
    chunk = chunks_of(byte_level(), "x🫠y")[0]
    assert chunk.texts is not None
    assert [text for text in chunk.texts if text] == ["x", "🫠", "y"]
    assert len(chunk.ids) > 3


def test_so_it_does_in_a_run_of_unknown_characters() -> None:
    chunk = chunks_of(metaspace("Unigram", "first"), "x日本é the 語")[0]
    assert chunk.texts is not None
    shown = [(i, text) for i, text in enumerate(chunk.texts) if text in tuple("日本é語")]
    assert [text for _, text in shown] == list("日本é語")
    lengths = [len("日".encode()), len("本".encode()), len("é".encode())]
    assert [b - a for (a, _), (b, _) in pairwise(shown)][:2] == lengths[:2]
    assert chunk.texts[shown[2][0] + 1 : shown[2][0] + lengths[2]] == [""]
    assert "".join(chunk.texts) == "x日本é the 語"


def test_no_special_token_is_added() -> None:
    tokenizer = byte_level_with_bos()
    ids = [token for chunk in chunks_of(tokenizer, ODD) for token in chunk.ids]
    assert ids == tokenizer(ODD)["input_ids"][1:]


def test_automatic_prefix_is_what_the_tokenizer_adds_in_front() -> None:
    from tokenizers.processors import TemplateProcessing

    assert automatic_prefix(byte_level()) == []
    tokenizer = byte_level_with_bos()
    assert automatic_prefix(tokenizer) == [tokenizer.bos_token_id]
    both = other_tokenizers()["word pieces"]
    before = both.backend_tokenizer.post_processor
    both.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> <unk> $A <unk>", special_tokens=[("<unk>", 0)]
    )
    assert automatic_prefix(both) == [0, 0]
    both.backend_tokenizer.post_processor = before


class Slow:
    """A tokenizer without offsets, as those in Python are: one token a character."""

    is_fast = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [*([1] if add_special_tokens else []), *map(ord, text)]


def test_slow_tokenizers_get_the_whole_document() -> None:
    chunks = list(tokenize_documents(Slow(), [(0, "ab"), (0, "c"), (1, "d"), (2, "")]))
    assert chunks == [
        TokenChunk(0, [97, 98, 99], None, "abc"),
        TokenChunk(1, [100], None, "d"),
        TokenChunk(2, [], None, ""),
    ]
    assert automatic_prefix(Slow()) == [1]
    # vLLM's own tokenizers call themselves fast and tell no offsets.
    (chunk,) = tokenize_documents(WithoutOffsets(byte_level()), [(0, "one two")])
    assert chunk == TokenChunk(0, whole(byte_level(), "one two"), None, "one two")


@given(odd_texts(300), st.integers(1, 500))
@settings(max_examples=50, deadline=None)
def test_limit_cuts_tokens_and_text(text: str, limit: int) -> None:
    tokenizer = byte_level()
    pieces = [(0, text), (1, text)]
    full = list(tokenize_documents(tokenizer, pieces, **SMALL))
    cut = list(limit_tokens(iter(full), limit))
    ids = [token for chunk in full for token in chunk.ids]
    assert [token for chunk in cut for token in chunk.ids] == ids[:limit]
    assert all(chunk.text == "".join(chunk.texts or []) for chunk in cut)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ScoreModeError, match=r"document 3 has a lone surrogate \('\\ud800'\)"):
        list(tokenize_documents(byte_level(), [(3, "a\ud800b")]))
