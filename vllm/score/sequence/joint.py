"""Tokens of many continuations of few contexts, without tokenising a long context each time.

The tokens of a text depend on what follows only near its end. So a context with several
continuations is tokenised once, and with each of them only its end. The end's tokens take over at
a space where both have the same tokens all around; where there is no such place, the whole text is
tokenised. `vllm.score.perplexity.resync` reads long documents in the same way, and says more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Characters of a context's end that are tokenised with each continuation; its first and last
# quarter are not compared.
END = 256
_LONG = 4 * END
_AGREEING_TOKENS = 8  # fewer prove nothing


@dataclass(frozen=True)
class Joint:
    """Tokens of context + continuation.

    Attributes:
        ids: [n], all of them.
        first: the first token with offsets.
        begin: the character that its offsets count from.
        offsets: [n - first], (start, end) of each; None where the tokenizer has none.
    """

    ids: list[int]
    first: int = 0
    begin: int = 0
    offsets: Sequence[tuple[int, int]] | None = None


@dataclass(frozen=True)
class _Shared:
    """A context's tokens, and its end from `begin` on.

    Tokens up to `kept` stay; what is tokenised from `begin` takes over at the character `over`, if
    its tokens between `low` and `high` are `agreed`. Positions count from `begin`.
    """

    begin: int
    ids: list[int]
    kept: int
    over: int
    low: int
    high: int
    agreed: list[tuple[int, int, int]]


class JointEncoder:
    """Tokenises pairs with a fast tokenizer, no special tokens added.

    A unigram model adds up float64 scores from the beginning of a word, which for some is the
    whole text; its texts are always tokenised whole.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._local = type(tokenizer.backend_tokenizer.model).__name__ in ("BPE", "WordPiece")

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Joint]:
        """(context, continuation) pairs, in order."""
        shared = self._shared_contexts(pairs)
        ends = [shared.get(context) for context, _ in pairs]
        encoded = self._tokenize(
            [
                context[0 if end is None else end.begin :] + continuation
                for (context, continuation), end in zip(pairs, ends, strict=True)
            ]
        )
        joints = [_join(end, *row) for end, row in zip(ends, encoded, strict=True)]
        whole = [i for i, joint in enumerate(joints) if joint is None]
        again = self._tokenize(["".join(pairs[i]) for i in whole])
        for i, (ids, offsets) in zip(whole, again, strict=True):
            joints[i] = Joint(ids, 0, 0, offsets)
        return [joint for joint in joints if joint is not None]

    def _shared_contexts(self, pairs: Sequence[tuple[str, str]]) -> dict[str, _Shared]:
        if not self._local:
            return {}
        uses = Counter(context for context, _ in pairs)
        long = [text for text, count in uses.items() if count > 1 and len(text) >= _LONG]
        found = zip(long, self._tokenize(long), strict=True)
        shared = ((text, _share(text, ids, offsets)) for text, (ids, offsets) in found)
        return {text: end for text, end in shared if end is not None}

    def _tokenize(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning that a text is longer than the model
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))


def _share(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> _Shared | None:
    """The place in the context's end where to go over; None if no word ends there."""
    if not ids:
        return None
    starts = [start for start, _ in offsets]
    begin = starts[max(0, bisect_left(starts, len(text) - END + 1) - 1)]
    low, high = begin + END // 4, len(text) - END // 4
    agreed = _within(ids, offsets, low, high)
    places = [
        start
        for (_, before, end), (_, start, after) in pairwise(agreed)
        if before < start < after and end <= start and _word_ends(text, end)
    ]
    if len(agreed) < _AGREEING_TOKENS or not places:
        return None
    over = min(places, key=lambda place: abs(place - (low + high) / 2))
    relative = [(token, start - begin, end - begin) for token, start, end in agreed]
    kept = bisect_left(starts, over)
    return _Shared(begin, ids[:kept], kept, over - begin, low - begin, high - begin, relative)


def _join(shared: _Shared | None, ids: list[int], offsets: list[tuple[int, int]]) -> Joint | None:
    """None if the end's tokens do not agree with the context's."""
    if shared is None:
        return Joint(ids, 0, 0, offsets)
    if _within(ids, offsets, shared.low, shared.high) != shared.agreed:
        return None
    over = bisect_left(offsets, (shared.over, 0))
    return Joint(shared.ids + ids[over:], shared.kept, shared.begin, offsets[over:])


def _within(
    ids: list[int], offsets: list[tuple[int, int]], low: int, high: int
) -> list[tuple[int, int, int]]:
    """(id, start, end) of the tokens that lie in [low, high]."""
    first = bisect_left(offsets, (low, 0))
    last = bisect_left(offsets, (high, 0))
    rows = zip(ids[first:last], offsets[first:last], strict=True)
    return [(token, start, end) for token, (start, end) in rows if start >= low and end <= high]


def _word_ends(text: str, position: int) -> bool:
    return text[position].isspace() and not text[position - 1].isspace()
