"""The cut of every kind of tokenizer against the bytes of its tokens, aligned with the text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from tests.perplexity.texts import byte_level
from tests.sequence import tokenizers
from vllm.score import ScoreModeError
from vllm.score.sequence import BoundaryTokenizer, SplitTokens
from vllm.score.sequence.encoding import Pair

TEXTS = [
    "日本語の文、中文 한국어",
    "x 語é語 👩‍👩‍👧‍👦🏽 e\u0301o\u0323\u0302",
    "def f(a):\n    if a:\n\t\treturn 12345\n\n    return 'x'",
    "  two  spaces,   three \t tab\r\n ",
    "The age of 1984 is the best… or is it?  ☃☃ ok",
    "<s>age</s> the",
    "мир ✓ ▲ naïve ǅ",
]
PAIRS = [(text[:i], text[i:]) for text in TEXTS for i in range(len(text))]
PAIRS += [(text[:i], text[i : i + 2]) for text in TEXTS for i in range(1, len(text))]

Bytes = Callable[[Any, list[int]], list[bytes | None]]


def _sentencepiece(make: Callable[[], Any]) -> tuple[Callable[[], Any], Bytes]:
    return make, tokenizers.sentencepiece_bytes


def _metaspace(*options: Any) -> tuple[Callable[[], Any], Bytes]:
    return _sentencepiece(partial(tokenizers.metaspace, *options))


def _byte_level(make: Callable[[], Any]) -> tuple[Callable[[], Any], Bytes]:
    return make, tokenizers.token_bytes


KINDS = {
    "byte-level": _byte_level(byte_level),
    "byte-level, leading space": _byte_level(partial(tokenizers.leading_space, False)),
    "byte-level, leading space, trimmed": _byte_level(partial(tokenizers.leading_space, True)),
    **{
        f"{model}, {dummy}": _metaspace(model, dummy)
        for model in ("BPE", "Unigram")
        for dummy in ("first", "always", "never", "legacy")
    },
    "BPE, unknown": _metaspace("BPE", "always", False),
    "Unigram, unknown": _metaspace("Unigram", "first", False),
    "Unigram, NFKC": _metaspace("Unigram", "first", True, True),
    "Mistral": _sentencepiece(tokenizers.mistral),
    "slow": _sentencepiece(partial(tokenizers.slow_sentencepiece, False)),
    "slow, legacy": _sentencepiece(partial(tokenizers.slow_sentencepiece, True)),
    "word pieces": (tokenizers.bert_like, tokenizers.word_piece_bytes),
}


def spans(
    pieces: list[bytes | None], text: bytes, dropped: bytes = b"", may_add: bool = True
) -> list[tuple[int, int]]:
    """Where each token lies in `text`, read from the front.

    A tokenizer may put one space of its own behind a special token. A piece that is None takes as
    many characters as it must.

    Args:
        dropped: of which no token tells, between tokens.
        may_add: a space may also be put before the text.
    """
    found: list[tuple[int, int]] = []

    def fits(i: int, at: int, may_add: bool) -> bool:
        if i == len(pieces):
            return not text[at:].strip(dropped)
        piece = pieces[i]
        while True:
            if piece is None:
                ends = [at + 1 + n for n in range(len(text) - at)]
                ends = [end for end in ends if end == len(text) or text[end] & 0xC0 != 0x80]
                if dropped:  # as much of a word as there is
                    ends = [end for end in ends[::-1] if not set(text[at:end]) & set(dropped)]
            else:
                own = [piece, piece[1:]] if may_add and piece.startswith(b" ") else [piece]
                ends = [at + len(choice) for choice in own if text.startswith(choice, at)]
            for end in ends:
                found.append((at, end))
                if fits(i + 1, end, piece in (b"<s>", b"</s>")):
                    return True
                found.pop()
            if at == len(text) or text[at] not in dropped:
                return False
            at += 1

    assert fits(0, 0, may_add), (pieces, text)
    return found


def cutter(tokenizer: Any, rule: str) -> Callable[[str, str], SplitTokens]:
    boundary = BoundaryTokenizer(tokenizer, rule)
    return lambda context, continuation: next(boundary.split([Pair(context, continuation)]))


def is_right(
    tokenizer: Any,
    pieces: list[bytes | None],
    joint: list[int],
    pair: Any,
    spanning: Any,
    strict: Any,
) -> bool:
    context, continuation = pair
    text, before = context + continuation, context
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(backend and backend.normalizer).__name__ in ("NFKC", "BertNormalizer"):
        text, before = map(backend.normalizer.normalize_str, (text, context))
        if not text.startswith(before):
            return True  # see test_a_character_composed_over_the_cut_is_scored
    words = type(backend and backend.model).__name__ == "WordPiece"
    where = spans(pieces, text.encode(), b" \t\n\r" if words else b"")
    cut = len(before.encode())
    # A space of the tokenizer's own belongs to what it stands before.
    beyond = (i for i, (begin, end) in enumerate(where) if end > cut or begin == cut == end)
    first = next(beyond, None)
    if first is None:
        with pytest.raises(ScoreModeError, match="leaves no token"):
            spanning(*pair)
        return True
    begin = where[first][0]
    bos = tokenizer.convert_tokens_to_ids("[CLS]") if words else tokenizer.bos_token_id
    written = joint[0] == bos
    if not context and written:
        first = 1  # it is the context
    needed = first == 0 or (not written and tokenizer.encode("a")[0] == bos)
    front = [bos] if needed else []
    try:
        result = spanning(*pair)
    except ScoreModeError as error:
        return front == [None] and "has no BOS or EOS" in str(error)
    strictly: Any = None
    with suppress(ScoreModeError):
        strictly = strict(*pair)
    held = before.encode()[begin:cut]
    shown = result.spanned_context.encode()
    return (
        result.token_ids == [*front, *joint]
        and result.start == len(front) + first
        and result.spans_boundary == (begin < cut)
        # A character is shown whole, and as it is written in the context.
        and (before != context or (shown.endswith(held) and len(shown) - len(held) < 4))
        and strictly == (None if begin < cut else result)
    )


@pytest.mark.parametrize("name", KINDS)
def test_every_cut_is_where_the_bytes_of_the_tokens_say(name):
    make, bytes_of = KINDS[name]
    tokenizer = make()
    rules = [cutter(tokenizer, rule) for rule in ("spanning", "strict")]
    wrong = []
    for pair in PAIRS:
        joint = tokenizer.encode("".join(pair), add_special_tokens=False)
        if not is_right(tokenizer, bytes_of(tokenizer, joint), joint, pair, *rules):
            wrong.append(pair)
    assert not wrong, f"{len(wrong)} of {len(PAIRS)}: {wrong[:5]}"


@pytest.mark.parametrize("name", [n for n in KINDS if n != "word pieces"])
def test_apart_a_continuation_has_no_space_that_is_not_its_own(name):
    make, bytes_of = KINDS[name]
    tokenizer = make()
    separate, encode = cutter(tokenizer, "separate"), tokenizers.without_own_space(tokenizer)
    pairs = [pair for pair in PAIRS if pair[0] and not pair[0].endswith(">")]
    wrong = []
    for context, continuation in pairs:
        result = separate(context, continuation)
        own = result.token_ids[result.start :]
        if "s>" in continuation:  # a special token, behind which the tokenizer begins anew
            try:
                spans(bytes_of(tokenizer, own), continuation.encode(), may_add=False)
            except AssertionError:
                wrong.append((context, continuation))
        elif own != encode(continuation):
            wrong.append((context, continuation))
    assert not wrong, f"{len(wrong)} of {len(pairs)}: {wrong[:5]}"
