"""Where a continuation begins: by offsets, by comparison, and what each rule makes of it."""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate, takewhile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import PIECES, byte_level, byte_level_with_bos, other_tokenizers
from tests.sequence import tokenizers
from vllm.score import ScoreModeError
from vllm.score.sequence import BoundaryTokenizer, SplitTokens
from vllm.score.sequence.boundary import Pair

MARKS = ["\u0323", "각", "\u11a8", "☃"]
SHORT = st.lists(st.sampled_from([*PIECES, *MARKS]), max_size=6).map("".join)
CONTEXTS = st.one_of(SHORT, st.text(max_size=8))
CONTINUATIONS = st.one_of(SHORT, st.text(max_size=6)).filter(bool)
MANY = settings(max_examples=100, deadline=None)


# Found by chance among thousands.
RARE = [
    ("", "  a"),
    ("  ", " a"),
    ("a\u0301", " "),
    (" ", " "),
    ("x ", "   "),
    ("\u0323a", "\u0301"),
]


def rare(test: Any) -> Any:
    for context, continuation in RARE:
        test = example(context=context, continuation=continuation)(test)
    return test


def split(
    tokenizer: Any, context: str, continuation: str, rule: str = "spanning", **options: Any
) -> SplitTokens:
    (result,) = BoundaryTokenizer(tokenizer, rule).split([Pair(context, continuation, **options)])
    return result


def without_prefix(tokenizer: Any, result: SplitTokens, text: str) -> tuple[list[int], int]:
    """(ids, start) of the text's own tokens."""
    front = len(result.token_ids) - len(tokenizer.encode(text, add_special_tokens=False))
    assert 0 <= front <= 1 <= result.start < len(result.token_ids)
    return result.token_ids[front:], result.start - front


@pytest.mark.parametrize("name", tokenizers.lossless())
@MANY
@rare
@given(context=CONTEXTS, continuation=CONTINUATIONS)
def test_the_cut_is_exact_to_the_byte(name, context, continuation):
    tokenizer = tokenizers.lossless()[name]
    text = context + continuation
    for boundary in (tokenizer, tokenizers.WithoutOffsets(tokenizer)):
        result = split(boundary, context, continuation)
        ids, start = without_prefix(tokenizer, result, text)

        pieces = tokenizers.token_bytes(tokenizer, ids)
        assert b"".join(pieces).decode() == text
        ends = list(accumulate(map(len, pieces)))
        cut = len(context.encode())
        first = next(i for i, end in enumerate(ends) if end > cut)
        begin = ends[first] - len(pieces[first])
        assert start == first
        assert result.spans_boundary == (begin < cut)
        held = context.encode()[begin:]
        # Of a character that is only partly in the token, the whole is shown.
        assert result.spanned_context.encode().endswith(held)
        assert len(result.spanned_context.encode()) - len(held) < 4


@MANY
@rare
@given(context=CONTEXTS, continuation=CONTINUATIONS)
def test_a_character_composed_over_the_cut_is_scored(context, continuation):
    tokenizer = tokenizers.composing()
    text, composed = context + continuation, unicodedata.normalize("NFC", context + continuation)
    result = split(tokenizer, context, continuation)
    ids, start = without_prefix(tokenizer, result, text)

    pieces = tokenizers.token_bytes(tokenizer, ids)
    assert b"".join(pieces).decode() == composed
    alone = unicodedata.normalize("NFC", context)
    same = "".join(
        a for a, _ in takewhile(lambda ab: ab[0] == ab[1], zip(alone, composed, strict=False))
    )
    begin = len(b"".join(pieces[:start]))
    assert begin <= len(same.encode()) < len(composed.encode())
    if same == alone:
        assert begin + len(pieces[start]) > len(alone.encode())
        assert result.spans_boundary == (begin < len(alone.encode()))
    else:
        assert result.spans_boundary


@pytest.mark.parametrize("name", [n for n in other_tokenizers() if n not in tokenizers.BYTE_LEVEL])
@MANY
@rare
@given(context=CONTEXTS, continuation=CONTINUATIONS)
def test_a_cut_between_tokens_leaves_the_context_its_own_tokens(name, context, continuation):
    tokenizer = tokenizers.with_start(name)
    joint = tokenizer.encode(context + continuation, add_special_tokens=False)
    alone = tokenizer.encode(context, add_special_tokens=False)
    for boundary in (tokenizer, tokenizers.WithoutOffsets(tokenizer)):
        try:
            result = split(boundary, context, continuation)
        except ScoreModeError as error:
            assert re.search("leaves no token", str(error))
            assert joint == alone
            continue
        ids, start = without_prefix(tokenizer, result, context + continuation)
        assert ids == joint
        if tokenizer.unk_token_id not in joint:
            assert result.spans_boundary == (joint[:start] != alone)
            if not result.spans_boundary:
                assert result.spanned_context == ""


def test_spaces_belong_to_the_side_where_they_are_written():
    tokenizer = byte_level()
    (word,) = tokenizer.encode(" the", add_special_tokens=False)
    apart = split(tokenizer, "in", " the")
    assert (apart.token_ids[apart.start :], apart.spans_boundary) == ([word], False)
    joined = split(tokenizer, "in ", "the")
    assert joined.token_ids == apart.token_ids and joined.start == apart.start
    assert (joined.spans_boundary, joined.spanned_context) == (True, " ")


def test_strict_refuses_a_token_over_the_boundary():
    tokenizer = byte_level()
    assert split(tokenizer, "in", " the", "strict") == split(tokenizer, "in", " the")
    with pytest.raises(ScoreModeError, match=r"^pair: the token ' the' holds .*context, ' ',"):
        split(tokenizer, "in ", "the", "strict")


def test_separate_encodes_the_two_apart():
    tokenizer = byte_level_with_bos()
    result = split(tokenizer, "in ", "the", "separate")
    parts = [tokenizer.encode(t, add_special_tokens=False) for t in ("in ", "the")]
    assert result.token_ids == [tokenizer.bos_token_id, *parts[0], *parts[1]]
    assert result.start == 1 + len(parts[0])
    assert not result.spans_boundary
    with pytest.raises(ScoreModeError, match="leaves no token"):
        split(tokenizers.bert_like(), "a", " ", "separate")
    with pytest.raises(ScoreModeError, match="'apart'; it must be one of spanning, strict"):
        BoundaryTokenizer(tokenizer, "apart")


def test_bos_stands_once_in_front():
    tokenizer = byte_level_with_bos()
    bos = tokenizer.bos_token_id
    plain = split(tokenizer, "a text", " here")
    assert plain.token_ids == tokenizer("a text here")["input_ids"]
    assert plain.token_ids.count(bos) == 1
    assert split(tokenizer, "<|bos|>a text", " here") == plain
    templated = split(tokenizer, "<|bos|>a text", " here", templated=True)
    assert templated == plain
    bare = split(tokenizer, "a text", " here", templated=True)
    assert bare.token_ids == plain.token_ids[1:] and bare.start == plain.start - 1


@pytest.mark.parametrize("make", [byte_level, byte_level_with_bos])
@pytest.mark.parametrize("templated", [False, True])
def test_an_empty_context_is_a_bos(make, templated):
    tokenizer = make()
    result = split(tokenizer, "", "the text", templated=templated)
    own = tokenizer.encode("the text", add_special_tokens=False)
    assert result == SplitTokens([tokenizer.bos_token_id, *own], 1)
    # A BOS that is itself the continuation is scored, after another one.
    doubled = split(tokenizer, "", "<|bos|>the text", templated=templated)
    assert doubled.token_ids == [tokenizer.bos_token_id] * 2 + own
    assert doubled.start == 1


def test_what_a_tokenizer_puts_behind_a_text_is_left_out():
    tokenizer = tokenizers.bert_like()
    result = split(tokenizer, "the text", " is here")
    assert [*result.token_ids, 2] == tokenizer("the text is here")["input_ids"]
    slow = tokenizers.slow()  # gives EOS behind a text, and has no BOS
    assert split(slow, "", "hé") == SplitTokens(
        [slow.eos_token_id, *slow.encode("hé", add_special_tokens=False)], 1
    )
    assert split(slow, "漢", "字").start == 3


def test_an_unknown_token_over_the_cut_is_scored():
    tokenizer = tokenizers.bert_like()
    for boundary in (tokenizer, tokenizers.WithoutOffsets(tokenizer)):
        result = split(boundary, "a \u2603", "\u2603 text")
        assert result.token_ids[result.start] == tokenizer.unk_token_id
        assert result.spans_boundary
        clean = split(boundary, "a \u2603", " text")
        assert clean.token_ids[clean.start] != tokenizer.unk_token_id
        assert not clean.spans_boundary


def test_nothing_to_score_is_refused():
    tokenizer = byte_level()
    with pytest.raises(ScoreModeError, match="pair: the continuation is empty"):
        split(tokenizer, "a", "")
    with pytest.raises(ScoreModeError, match="lone surrogate"):
        split(tokenizer, "a", "\ud800")
    with pytest.raises(ScoreModeError, match="the context has a lone surrogate"):
        split(tokenizer, "\udfff", "a")
    word_pieces = tokenizers.bert_like()
    for boundary in (word_pieces, tokenizers.WithoutOffsets(word_pieces)):
        with pytest.raises(ScoreModeError, match="leaves no token of the continuation '  '"):
            split(boundary, "a", "  ")
        with pytest.raises(ScoreModeError, match="leaves no token"):
            split(boundary, "e", "\u0301")  # accents are stripped
    without_start = other_tokenizers()["word pieces"]
    with pytest.raises(ScoreModeError, match="has no BOS or EOS token to put there; give a cont"):
        split(without_start, "", "a")


def test_pairs_come_back_in_order_whatever_the_batches(monkeypatch):
    from vllm.score.sequence import boundary

    tokenizer = byte_level()
    pairs = [Pair(c, t) for c in ("one", "two words") for t in (" a", " bc", "d")]
    whole = list(BoundaryTokenizer(tokenizer).split(pairs))
    monkeypatch.setattr(boundary, "_BATCH_CHARACTERS", 8)
    assert list(BoundaryTokenizer(tokenizer).split(iter(pairs))) == whole
    for pair, result in zip(pairs, whole, strict=True):
        own = result.token_ids[-len(tokenizer.encode(pair.context + pair.continuation)) :]
        assert tokenizer.decode(own) == pair.context + pair.continuation
