"""Tokens of contexts and their continuations, no special tokens added: together, or apart.

The tokens of a text depend on what follows only near its end. So a context with several
continuations is tokenised once, and with each of them only its end. The end's tokens take over at
a space where both have the same tokens all around; where there is no such place, the whole text is
tokenised. `vllm.score.data.tokenize` reads long documents in the same way, and says more.

A continuation tokenised apart gets no space of the tokenizer's own (sentencepiece's "dummy
prefix").
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from vllm.score.data.tokenize import Token, TokenBytes, place_to_go_over, tokens_within
from vllm.score.errors import ScoreModeError

# Characters of a context's end that are tokenised with each continuation; its first and last
# quarter are not compared.
END = 256
_LONG = 4 * END
# Put before a text where the tokenizer's own space cannot be switched off. The first is in hardly
# any vocabulary and becomes bytes, which never merge with others; the rest is for vocabularies
# without bytes.
_ANCHORS = ("\ue000", "\n", ".", "|", "0", "a")
# What adds the space, as `tokenizers` writes it, and the same without.
_SPACELESS: dict[str, dict[str, Any]] = {
    "Prepend": {"type": "Sequence", "normalizers": []},
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


class Pair(NamedTuple):
    """One continuation of one context.

    Attributes:
        context: may be empty.
        continuation: may not.
        templated: the context came from a chat template, which writes special tokens itself.
        name: for errors.
    """

    context: str
    continuation: str
    templated: bool = False
    name: str = "pair"


class Tokens(NamedTuple):
    """Tokens of a text: of its end, and those before.

    Attributes:
        ids: [n], of the end.
        offsets: [n], (start, end) of each, in characters from `begin` on; empty where the
            tokenizer has none.
        before: ids of the tokens in front of these.
        begin: the character that the offsets count from.
    """

    ids: list[int]
    offsets: Sequence[tuple[int, int]] = ()
    before: Sequence[int] = ()
    begin: int = 0


class _Shared(NamedTuple):
    """A context's tokens, and its end from `begin` on.

    The tokens `ids` stay; what is tokenised from `begin` takes over at the character `over`, if its
    tokens between `low` and `high` are `agreed`. Positions count from `begin`.
    """

    begin: int
    ids: list[int]
    over: int
    low: int
    high: int
    agreed: list[Token]


class JointEncoder:
    """Tokenises context and continuation together.

    A unigram model adds up float64 scores from the beginning of a word, which for some is the
    whole text; its texts are always tokenised whole, as are those of a tokenizer that is not fast.

    Args:
        tokenizer: of Hugging Face or vLLM.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = bool(getattr(tokenizer, "is_fast", False)) and backend is not None
        self._local = self._fast and type(backend.model).__name__ in ("BPE", "WordPiece")

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Tokens]:
        """Of (context, continuation) pairs, in order."""
        shared = [self._shared_contexts(pairs).get(context) for context, _ in pairs]
        texts = [c[s.begin if s else 0 :] + t for (c, t), s in zip(pairs, shared, strict=True)]
        ends = self._tokenize(texts)
        joined = [_join(s, end) if s else end for s, end in zip(shared, ends, strict=True)]
        whole = [c + t for (c, t), found in zip(pairs, joined, strict=True) if found is None]
        again = iter(self._tokenize(whole))
        return [next(again) if found is None else found for found in joined]

    def _shared_contexts(self, pairs: Sequence[tuple[str, str]]) -> dict[str, _Shared | None]:
        if not self._local:
            return {}
        uses = Counter(context for context, _ in pairs)
        long = [text for text, count in uses.items() if count > 1 and len(text) >= _LONG]
        return dict(zip(long, map(_share, long, self._tokenize(long)), strict=True))

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        if not texts:
            return []
        if not self._fast:
            return [Tokens(encode(self._tokenizer, text)) for text in texts]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning that a text is longer than the model
        )
        return list(map(Tokens, encoded["input_ids"], encoded["offset_mapping"]))


def _share(text: str, whole: Tokens) -> _Shared | None:
    """The place in the context's end where to go over; None if no word ends there."""
    if not whole.ids:
        return None
    starts = [start for start, _ in whole.offsets]
    begin = starts[max(0, bisect_left(starts, len(text) - END + 1) - 1)]
    low, high = begin + END // 4, len(text) - END // 4
    agreed = tokens_within(whole.ids, whole.offsets, low, high)
    over = place_to_go_over(agreed, text, (low + high) / 2)
    if over is None:
        return None
    relative = [(token, start - begin, end - begin) for token, start, end in agreed]
    kept = whole.ids[: bisect_left(starts, over)]
    return _Shared(begin, kept, over - begin, low - begin, high - begin, relative)


def _join(shared: _Shared, end: Tokens) -> Tokens | None:
    """None if the end's tokens do not agree with the context's."""
    if tokens_within(end.ids, end.offsets, shared.low, shared.high) != shared.agreed:
        return None
    over = bisect_left(end.offsets, (shared.over, 0))
    return Tokens(end.ids[over:], end.offsets[over:], shared.ids, shared.begin)


class ApartEncoder:
    """Tokenises a continuation by itself, without the space that many tokenizers put before a text.

    Args:
        tokenizer: of Hugging Face or vLLM.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer, self._bytes = tokenizer, token_bytes
        self._context = lru_cache(maxsize=1)(self._encode)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bare: Any = None
        if token_bytes.dummy and backend is not None:
            bare = _without_space(backend)
            first = bare.encode("a", add_special_tokens=False).ids[:1]
            if not any(token_bytes(token).startswith(b" ") for token in first):
                self._bare = bare

    def encode(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation.

        Without a context the continuation begins with the tokenizer's space; behind a special
        token it may, as the tokenizer has it.

        Raises:
            ScoreModeError: the tokenizer's space cannot be kept away.
        """
        context = self._context(pair.context)
        return context, self._continuation(pair, context)

    def _continuation(self, pair: Pair, context: list[int]) -> list[int]:
        text = pair.continuation
        if not self._bytes.dummy or not context:
            return self._encode(text)
        special = self._bytes.added.get(context[-1])
        if special is not None and pair.context.rstrip().endswith(special.content):
            behind = self._encode(special.content + text)
            if behind[:1] == context[-1:]:
                return behind[1:]
        return self._behind_anchor(pair) if self._bare is None else self._bare_ids(text)

    def _bare_ids(self, text: str) -> list[int]:
        """Behind a special token inside of the text, the tokenizer's own reading stands."""
        found = self._bare.encode(text, add_special_tokens=False)
        for index, (token, (start, end)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            added = self._bytes.added.get(token)
            if added is not None and text[start:end].strip() == added.content:
                return [*found.ids[:index], *self._encode(text[start:])]
        return list(found.ids)

    def _behind_anchor(self, pair: Pair) -> list[int]:
        """A text that merges with the anchor shows: the anchor's own tokens are gone."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        for anchor in _ANCHORS:
            alone, both = self._encode(anchor), self._encode(anchor + pair.continuation)
            if alone and alone[-1] != unknown and both[: len(alone)] == alone:
                return both[len(alone) :]
        raise ScoreModeError(
            f"{pair.name}: boundary='separate' does not work with this tokenizer "
            f"({type(self._tokenizer).__name__}), which puts a space that cannot be kept away "
            f"before the continuation {pair.continuation[:40]!r}; use boundary='spanning'."
        )

    def _encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text by itself, without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _without_space(backend: Any) -> Any:
    """A copy of a fast tokenizer that puts no space before a text."""

    def spaceless(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, **_SPACELESS.get(part.get("type", ""), {})}

    settings = json.loads(backend.to_str(), object_hook=spaceless)
    copy = type(backend).from_str(json.dumps(settings))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy
