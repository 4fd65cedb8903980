"""Window plans: which tokens a model sees together, and which of them are scored.

Pure arithmetic over a stream of tokens whose length need not be known. A plan reads the stream
through one function, `ensure(n)`: make the first n tokens of the stream available and return how
many of them exist, that is min(n, length). `known_length` makes one for a stream of known length.

A stream is one text: the tokens that the BOS rule puts in front of it (`lead` of them, never
scored), then the text's own tokens. Its first token has no context, so it is never a target.
Every plan yields its spans with growing `begin` and growing, disjoint targets: each scored token
is scored exactly once, and tokens before a span's `begin` are never needed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vllm.score.errors import ScoreModeError

Ensure = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Span:
    """One window: the prompt is stream[begin:end], the targets are stream[first_target:end]."""

    begin: int
    end: int
    first_target: int

    @property
    def num_targets(self) -> int:
        return self.end - self.first_target


def known_length(length: int) -> Ensure:
    """The `ensure` of a stream of `length` tokens that are all there."""
    return lambda wanted: min(wanted, length)


@dataclass(frozen=True)
class WindowPlan:
    """Base of the plans below.

    context_length: tokens the model sees at most in one window, BOS included.
    """

    context_length: int

    def __post_init__(self) -> None:
        _check_integer("context_length", self.context_length, minimum=2)

    @property
    def covers_everything(self) -> bool:
        """Whether every token of a text is a target, but perhaps its first."""
        return False

    @property
    def step(self) -> int:
        """Tokens from one window's begin to the next (the last window may differ)."""
        return self.context_length

    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        """The windows of one stream, in order.

        Args:
            ensure: reads the stream, see the module's docstring.
            lead: tokens at the front of the stream that are context only (a BOS).
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, for fingerprints and reports."""
        return {"plan": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class SlidingWindows(WindowPlan):
    """Overlapping windows: the arithmetic of Hugging Face's guide to perplexity.

    Windows begin at 0, stride, 2 x stride ... and end at min(begin + context_length, length); the
    targets of a window are the tokens after the previous window's end. So the first window scores
    all its tokens (but the first of the stream), each later one its last `stride`, with
    context_length - stride tokens of context or more.

    The last window begins on the same grid and is shorter: it scores what is left, with
    context_length - stride tokens of context. There is none when the previous one ended the text.

    With stride == context_length nothing overlaps: the first token of each window has no context
    and is not scored.

    Args:
        reserved: tokens that whoever sends the windows puts in front of each (a BOS a window):
            they count against context_length, and every token of the stream then has a context.
    """

    stride: int
    reserved: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_integer("stride", self.stride, minimum=1)
        if self.stride > self.context_length:
            raise ScoreModeError(
                f"stride is {self.stride}, more than context_length {self.context_length}: tokens "
                "between the windows would never be scored; choose a stride of at most "
                "context_length"
            )

    @property
    def covers_everything(self) -> bool:
        return self.stride < self.context_length or self.reserved > 0

    @property
    def step(self) -> int:
        return min(self.stride, self.context_length - self.reserved)

    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        size = self.context_length - self.reserved
        needs_context = 0 if self.reserved else 1
        begin = scored = 0
        while True:
            end = ensure(begin + size)
            if end <= scored:
                return
            first = max(scored, begin + needs_context, lead)
            if first < end:
                yield Span(begin, end, first)
            if end < begin + size:
                return
            scored = end
            begin += self.step


@dataclass(frozen=True)
class RowWindows(WindowPlan):
    """Rows of exactly context_length tokens, side by side; an incomplete last row is dropped.

    Args:
        first_scored: offset in the row of the first target (1: all that have context).
        drop_last_if_exact: also drop a last row that ends exactly with the text.
        max_rows: rows at most.
        min_rows: a shorter text is an error.
    """

    first_scored: int = 1
    drop_last_if_exact: bool = False
    max_rows: int | None = None
    min_rows: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.first_scored < self.context_length:
            raise ScoreModeError(
                f"first_scored is {self.first_scored}; it must lie between 1 and "
                f"context_length - 1 = {self.context_length - 1}"
            )

    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        size = self.context_length
        needed = self.min_rows * size + self.drop_last_if_exact
        if (length := ensure(needed)) < needed:
            fits = (length - self.drop_last_if_exact) // self.min_rows
            smaller = f", or ask for windows of {fits} tokens or fewer (NAME:{fits})"
            raise ScoreModeError(
                f"the text has only {length} tokens (BOS included), and windows of {size} need at "
                f"least {needed}; give a longer text{smaller if fits >= 3 else ''}"
            )
        row = 0
        while self.max_rows is None or row < self.max_rows:
            begin, end = row * size, (row + 1) * size
            if ensure(end + self.drop_last_if_exact) < end + self.drop_last_if_exact:
                return
            yield Span(begin, end, max(begin + self.first_scored, lead))
            row += 1


@dataclass(frozen=True)
class RollingWindows(WindowPlan):
    """lm-eval's rolling windows with one token of context (`loglikelihood_rolling`).

    The stream is one prefix token and the document. Full windows score context_length - 1 tokens
    after one token of context; the last one ends with the document and reaches back to be as long
    as the others, so that its few targets have a full context. Every document token is scored.
    """

    @property
    def covers_everything(self) -> bool:
        return True

    @property
    def step(self) -> int:
        return self.context_length - 1

    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        end = ensure(self.context_length)
        if (first := max(lead, 1)) < end:
            yield Span(0, end, first)
        while (next_end := ensure(end + self.step)) > end:
            yield Span(next_end - self.context_length, next_end, end)
            end = next_end


def _check_integer(field: str, value: object, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ScoreModeError(f"{field} is {value!r}; it must be an integer of at least {minimum}")
