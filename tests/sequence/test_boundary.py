"""Where a continuation begins: by offsets, by comparison, and what each rule makes of it."""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from itertools import accumulate, takewhile
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import PIECES, PROSE, byte_level, byte_level_with_bos, other_tokenizers
from tests.sequence import tokenizers
from vllm.score import ScoreModeError
from vllm.score.sequence import BoundaryTokenizer, SplitTokens
from vllm.score.sequence.encoding import Pair

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
    with pytest.raises(ScoreModeError, match=r"'apart' is unknown .*; there are spanning, strict"):
        BoundaryTokenizer(tokenizer, "apart")


@pytest.mark.parametrize("model", ["BPE", "Unigram"])
@pytest.mark.parametrize("dummy", ["first", "always", "never", "legacy"])
def test_the_tokenizers_own_space_is_no_part_of_a_continuation_apart(model, dummy):
    tokenizer = tokenizers.metaspace(model, dummy)
    behind = tokenizer.encode("xage", add_special_tokens=False)
    own = tokenizer.encode("x", add_special_tokens=False)
    assert split(tokenizer, "x", "age", "separate") == SplitTokens(behind, len(own))


def test_a_tokenizer_whose_space_cannot_be_kept_away_is_refused_apart(monkeypatch):
    tokenizer = tokenizers.slow_sentencepiece(True)
    dots = split(tokenizer, "x", "...", "separate")
    assert tokenizer.convert_ids_to_tokens(dots.token_ids[dots.start :])[0].startswith(".")
    monkeypatch.setattr("vllm.score.sequence.encoding._ANCHORS", (".",))  # merges with more of them
    with pytest.raises(ScoreModeError, match=r"pair: boundary='separate' .* \(SentencePiece"):
        split(tokenizer, "x", "...", "separate")


def test_bytes_of_an_unknown_character_span_nothing():
    tokenizer = tokenizers.metaspace("Unigram", "first")
    result = split(tokenizer, "日本", "語", "strict")
    assert tokenizer.convert_ids_to_tokens(result.token_ids[result.start :]) == [
        f"<0x{byte:02X}>" for byte in "語".encode()
    ]


@pytest.mark.parametrize(
    "make", [tokenizers.mistral, partial(tokenizers.slow_sentencepiece, True)], ids=["vLLM", "slow"]
)
def test_indentation_over_the_cut_is_found_behind_a_newline_of_bytes(make):
    tokenizer = make()
    result = split(tokenizer, "def f():\n ", "   return x")
    pieces = tokenizer.convert_ids_to_tokens(result.token_ids)
    assert pieces[result.start - 1 : result.start + 1] == ["<0x0A>", "▁▁▁▁"]
    assert (result.spans_boundary, result.spanned_context) == (True, " ")
    with pytest.raises(ScoreModeError, match=r"the token '    ' holds both .* context, ' ', and"):
        split(tokenizer, "def f():\n ", "   return x", "strict")


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
    # A BOS that the continuation begins with is its context.
    assert split(tokenizer, "", "<|bos|>the text", templated=templated) == result
    alone = split(tokenizer, "", "<|bos|>", templated=templated)
    assert alone == SplitTokens([tokenizer.bos_token_id] * 2, 1)


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


def test_white_space_that_a_special_token_swallows_is_its_own():
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    for make in (partial(tokenizers.metaspace, "BPE", "always"), byte_level):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=type(make().backend_tokenizer).from_str(
                make().backend_tokenizer.to_str()
            ),
            bos_token=make().bos_token,
        )
        left, right = (AddedToken("<|l|>", lstrip=True), AddedToken("<|r|>", rstrip=True))
        tokenizer.add_special_tokens({"additional_special_tokens": [left, right]})
        behind = split(tokenizer, "x <|r|>  ", "the")
        assert not behind.spans_boundary
        assert tokenizer.decode(behind.token_ids[behind.start :]).strip("▁ ") == "the"
        within = split(tokenizer, "x <|r|> ", " the")
        assert (within.spans_boundary, within.spanned_context) == (True, "<|r|> ")
        before = split(tokenizer, "x ", " <|l|>é")
        assert (before.spans_boundary, before.spanned_context) == (True, " ")
        assert tokenizer.decode(before.token_ids[before.start]) == "<|l|>"


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


@pytest.mark.parametrize(
    "make",
    [
        byte_level_with_bos,
        tokenizers.composing,
        partial(tokenizers.leading_space, True),
        partial(tokenizers.metaspace, "BPE", "legacy"),
        partial(tokenizers.metaspace, "Unigram", "first"),
    ],
)
def test_a_long_context_is_cut_for_many_continuations_as_for_one(make):
    tokenizer = make()
    texts = [" a word", "ing", "\n\n", "  x", "漢字", "\u0301e", "<s>a"]
    pairs = [Pair(c, t) for c in (PROSE[:5000], PROSE[:4001] + "漢e") for t in texts]
    apart = [next(BoundaryTokenizer(tokenizer).split([pair])) for pair in pairs]
    assert list(BoundaryTokenizer(tokenizer).split(pairs)) == apart


def test_pairs_come_back_in_order_whatever_the_batches(monkeypatch):
    tokenizer = byte_level()
    pairs = [Pair(c, t) for c in ("one", "two words") for t in (" a", " bc", "d")]
    whole = list(BoundaryTokenizer(tokenizer).split(pairs))
    monkeypatch.setattr("vllm.score.sequence.boundary._BATCH_CHARACTERS", 8)
    assert list(BoundaryTokenizer(tokenizer).split(iter(pairs))) == whole
    for pair, result in zip(pairs, whole, strict=True):
        own = result.token_ids[-len(tokenizer.encode(pair.context + pair.continuation)) :]
        assert tokenizer.decode(own) == pair.context + pair.continuation
