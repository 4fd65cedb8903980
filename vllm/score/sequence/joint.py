"""Tokens of many continuations of few contexts, without tokenising a long context each time.

The tokens of a text depend on what follows only near its end. So a context with several
continuations is tokenised once, and with each of them only its end. The end's tokens take over at
a space where both have the same tokens all around; where there is no such place, the whole text is
tokenised. `vllm.score.data.tokenize` reads long documents in the same way, and says more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.data.tokenize import Token, place_to_go_over, tokens_within

# Characters of a context's end that are tokenised with each continuation; its first and last
# quarter are not compared.
END = 256
_LONG = 4 * END


@dataclass(frozen=True)
class Joint:
    """Tokens of context + continuation.

    Attributes:
        ids: [n], all of them.
        first: the first token with offsets.
        begin: the character that its offsets count from.
        offsets: [n - first], (start, end) of each; empty where the tokenizer has none.
    """

    ids: list[int]
    first: int = 0
    begin: int = 0
    offsets: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class _Shared:
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
    """Tokenises pairs, no special tokens added.

    A unigram model adds up float64 scores from the beginning of a word, which for some is the
    whole text; its texts are always tokenised whole, as are those of a tokenizer that is not fast.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = bool(getattr(tokenizer, "is_fast", False)) and backend is not None
        self._local = self._fast and type(backend.model).__name__ in ("BPE", "WordPiece")

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Joint]:
        """(context, continuation) pairs, in order."""
        shared = self._shared_contexts(pairs)
        begins = [shared[context].begin if context in shared else 0 for context, _ in pairs]
        ends = self._tokenize([c[begin:] + t for (c, t), begin in zip(pairs, begins, strict=True)])
        joints = [
            _join(shared[context], end) if context in shared else end
            for (context, _), end in zip(pairs, ends, strict=True)
        ]
        whole = [c + t for (c, t), joint in zip(pairs, joints, strict=True) if joint is None]
        again = iter(self._tokenize(whole))
        return [next(again) if joint is None else joint for joint in joints]

    def _shared_contexts(self, pairs: Sequence[tuple[str, str]]) -> dict[str, _Shared]:
        if not self._local:
            return {}
        uses = Counter(context for context, _ in pairs)
        long = [text for text, count in uses.items() if count > 1 and len(text) >= _LONG]
        shared = zip(long, map(_share, long, self._tokenize(long)), strict=True)
        return {text: end for text, end in shared if end is not None}

    def _tokenize(self, texts: list[str]) -> list[Joint]:
        if not texts:
            return []
        if not self._fast:
            encode = self._tokenizer.encode
            return [Joint(list(encode(t, add_special_tokens=False)) if t else []) for t in texts]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning that a text is longer than the model
        )
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [Joint(ids, offsets=offsets) for ids, offsets in rows]


def _share(text: str, whole: Joint) -> _Shared | None:
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


def _join(shared: _Shared, end: Joint) -> Joint | None:
    """None if the end's tokens do not agree with the context's."""
    if tokens_within(end.ids, end.offsets, shared.low, shared.high) != shared.agreed:
        return None
    over = bisect_left(end.offsets, (shared.over, 0))
    return Joint(shared.ids + end.ids[over:], len(shared.ids), shared.begin, end.offsets[over:])
