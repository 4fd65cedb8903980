"""What is scored: window plans, the prompts made of them, and the windows of a stream of tokens.

A window plan says which tokens a model sees together, and which of them are scored. It is pure
arithmetic over a stream of tokens whose length need not be known. It reads the stream through one
function, `ensure(n)`: make the first n tokens of the stream available and return how many of them
exist, that is min(n, length).

A stream is one text: the tokens that the BOS rule puts in front of it (`lead` of them, never
scored), then the text's own tokens. Its first token has no context, so it is never a target.
Every plan yields its spans with growing `begin` and growing, disjoint targets: each scored token
is scored exactly once, and tokens before a span's `begin` are never needed again.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, count, groupby, repeat
from typing import Any, NamedTuple

import numpy as np

from vllm.score.data.tokenize import TokenChunk
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import own_prefix_length

Ensure = Callable[[int], int]


class Span(NamedTuple):
    """One window: the prompt is stream[begin:end], the targets are stream[first_target:end]."""

    begin: int
    end: int
    first_target: int


@dataclass(frozen=True)
class WindowPlan(ABC):
    """Base of the plans below.

    context_length: tokens the model sees at most in one window, BOS included; at least 2.
    """

    context_length: int

    @property
    def covers_everything(self) -> bool:
        """Whether every token of a text is a target, but perhaps its first."""
        return self.step < self.context_length

    @property
    def step(self) -> int:
        """Tokens from one window's begin to the next (the last window may differ)."""
        return self.context_length

    @abstractmethod
    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        """The windows of one stream, in order.

        Args:
            ensure: reads the stream, see the module's docstring.
            lead: tokens at the front of the stream that are context only (a BOS).
        """


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
        stride: from 1 to context_length.
        reserved: tokens that whoever sends the windows puts in front of each (a BOS per window):
            they count against context_length, and every token of the stream then has a context.
    """

    stride: int
    reserved: int = 0

    @property
    def step(self) -> int:
        return min(self.stride, self.context_length - self.reserved)

    def spans(self, ensure: Ensure, *, lead: int = 0) -> Iterator[Span]:
        size = self.context_length - self.reserved
        needs_context = 0 if self.reserved else 1
        scored = 0
        for begin in count(0, self.step):
            end = ensure(begin + size)
            first = max(scored, begin + needs_context, lead)
            if first < end:
                yield Span(begin, end, first)
            if end < begin + size:
                return
            scored = end


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
        for row in count() if self.max_rows is None else range(self.max_rows):
            begin, end = row * size, (row + 1) * size
            if ensure(end + self.drop_last_if_exact) < end + self.drop_last_if_exact:
                return
            yield Span(begin, end, max(begin + self.first_scored, lead))


@dataclass(frozen=True)
class RollingWindows(WindowPlan):
    """lm-eval's rolling windows with one token of context (`loglikelihood_rolling`).

    The stream is one prefix token and the document. Full windows score context_length - 1 tokens
    after one token of context; the last one ends with the document and reaches back to be as long
    as the others, so that its few targets have a full context. Every document token is scored.
    """

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


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that are added to each text and scored like its own.

    before, after: token ids.
    unless_begun: texts that begin with these characters get none.
    if_empty: an empty text gets them, too.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    unless_begun: str | None = None
    if_empty: bool = True


@dataclass(frozen=True)
class ScoringPlan:
    """A complete description of the prompts of a run. Equal plans send equal prompts.

    windows: the window plan, made anew for every document.
    separator: joins the documents into one text; None: each document stands alone.
    prefix: tokens in front of each text, context only.
    every_window: tokens in front of each window, context only.
    replace_first: token in the place of each window's first one.
    prefix_once: a text that begins with the prefix (or with `every_window`) itself gets none in
        front; what it wrote of it is context only (`vllm.score.tokens`). Conventions double it as
        their tools do.
    added: tokens of each text that a tool's tokenizer adds and the tool scores.
    """

    windows: WindowPlan
    separator: str | None = "\n\n"
    prefix: tuple[int, ...] = ()
    every_window: tuple[int, ...] = ()
    replace_first: int | None = None
    prefix_once: bool = False
    added: AddedTokens = AddedTokens()

    def describe(self) -> dict[str, Any]:
        """The plan as plain values, for fingerprints: stores of older versions have the same."""
        told = asdict(self)
        windows = {"plan": type(self.windows).__name__, **told.pop("windows")}
        if not self.prefix_once:
            del told["prefix_once"]
        if not (self.added.before or self.added.after):
            del told["added"]
        return {**windows, **told}

    def key(self) -> str:
        """Short name of the plan for files: equal for equal plans."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def describe_bos(self) -> str:
        """What stands in front, in words."""
        if self.replace_first is not None:
            return f"token {self.replace_first} in the place of each window's first"
        if self.every_window:
            return f"{_tokens(self.every_window)} in front of every window"
        what = "the text" if self.separator is not None else "each document"
        found = [f"{_tokens(self.prefix)} in front of {what}"] if self.prefix else []
        if self.added.before:
            found.append(f"{_tokens(self.added.before)} at its start, scored")
        if self.added.after:
            found.append(f"{_tokens(self.added.after)} at its end, scored")
        return ", ".join(found) or "none"


@dataclass(frozen=True)
class Window:
    """One request: the log-probabilities of the last `num_targets` tokens of `token_ids`.

    index: number of the window in the run.
    document: number of the document.
    position: number of the first target among the text's own tokens (a BOS does not count, and
        stands at -1 where it is scored), over all documents; the other targets follow it.
    texts: the characters of each target; None where they are not known.
    """

    index: int
    document: int
    token_ids: list[int]
    num_targets: int
    position: int
    texts: list[str] | None

    @property
    def target_ids(self) -> list[int]:
        return self.token_ids[-self.num_targets :]

    def digest(self) -> bytes:
        """sha256 of the prompt: equal prompts, equal digests."""
        return hashlib.sha256(np.asarray(self.token_ids, dtype="<i8").tobytes()).digest()


class TextStream:
    """The tokens of all documents on their way to the windows, counted and hashed as they pass.

    Only what a window needs is kept of the text.

    Args:
        chunks: the tokens, document by document.

    Attributes:
        documents, tokens, bytes: how much has passed (bytes: of UTF-8).
        own_prefixes, own_prefix_tokens: documents that began with the prefix themselves, and the
            tokens of it that they wrote: context, never scored.
        inner_prefixes: how often the prefix's first token stood elsewhere in a text.
    """

    def __init__(self, chunks: Iterable[TokenChunk]) -> None:
        self.documents = self.tokens = self.bytes = 0
        self.own_prefixes = self.own_prefix_tokens = self.inner_prefixes = 0
        self._document_begin = 0  # tokens before the document that passes
        self._hash = hashlib.sha256()
        self._chunks = iter(chunks)

    def sha256(self) -> str:
        """Of the text's UTF-8 bytes, documents separated by a zero byte; of the token ids as
        little-endian int64 where there is no text."""
        return self._hash.hexdigest()

    def windows(self, plan: ScoringPlan) -> Iterator[Window]:
        """The windows of every document, in order; reads the stream to its end."""
        prefix, every_window = list(plan.prefix), list(plan.every_window)
        once = (prefix or every_window) if plan.prefix_once else []
        index = 0
        for document, group in groupby(self._pass(once), key=lambda chunk: chunk.document):
            begin_of_document = self._document_begin
            before, chunks = _with_added(group, plan.added)
            tokens = _DocumentTokens(chunks)
            own = own_prefix_length(
                [token for token, _ in tokens.slice(0, tokens.ensure(len(once)))], once
            )
            self.own_prefixes += bool(own)
            self.own_prefix_tokens += own
            self.inner_prefixes -= bool(own)
            # Of a BOS in front of every window the first window has one, too.
            removed, lead = (own, 0) if every_window else (0, own or len(prefix))
            front = ([] if own else prefix) + before
            tokens.replace_first(removed, front)
            base = begin_of_document + removed - len(front)
            for begin, end, first_target in plan.windows.spans(tokens.ensure, lead=lead):
                ids, texts = map(list, zip(*tokens.slice(begin, end), strict=True))
                if plan.replace_first is not None:
                    ids = [plan.replace_first, *ids[1:]]
                known = [text for text in texts[first_target - begin :] if text is not None]
                yield Window(
                    index=index,
                    document=document,
                    token_ids=every_window + ids,
                    num_targets=end - first_target,
                    position=base + first_target,
                    texts=known if len(known) == end - first_target else None,
                )
                index += 1
                tokens.release(begin)
            for _ in chunks:  # what the plan leaves out is counted and hashed, too
                pass

    def _pass(self, once: list[int]) -> Iterator[TokenChunk]:
        previous = None
        for chunk in self._chunks:
            if chunk.document != previous:
                if previous is not None:
                    self._hash.update(b"\0")
                self.documents += 1
                self._document_begin = self.tokens
                previous = chunk.document
            if chunk.text is None:
                self._hash.update(np.asarray(chunk.ids, dtype="<i8").tobytes())
            else:
                data = chunk.text.encode("utf-8")
                self._hash.update(data)
                self.bytes += len(data)
            self.tokens += len(chunk.ids)
            if once:
                self.inner_prefixes += chunk.ids.count(once[0])
            yield chunk


class _DocumentTokens:
    """The stream of one document, what is in front of it included: read on demand, forgotten from
    the front."""

    def __init__(self, chunks: Iterator[TokenChunk]) -> None:
        self._tokens: list[tuple[int, str | None]] = []  # (id, characters)
        self._begin = 0
        self._chunks = chunks

    def replace_first(self, count: int, front: list[int]) -> None:
        """Put tokens in the place of the first `count`."""
        self._tokens[:count] = [(token, "") for token in front]

    def ensure(self, wanted: int) -> int:
        while self._begin + len(self._tokens) < wanted and (chunk := next(self._chunks, None)):
            self._tokens += zip(chunk.ids, chunk.texts or repeat(None), strict=False)
        return min(wanted, self._begin + len(self._tokens))

    def slice(self, begin: int, end: int) -> list[tuple[int, str | None]]:
        return self._tokens[begin - self._begin : end - self._begin]

    def release(self, begin: int) -> None:
        """Tokens before `begin` will not be asked for again."""
        del self._tokens[: begin - self._begin]
        self._begin = begin


def _with_added(
    chunks: Iterator[TokenChunk], added: AddedTokens
) -> tuple[list[int], Iterator[TokenChunk]]:
    """What a document gets in front, and its chunks with what it gets behind."""
    if not (added.before or added.after):
        return [], chunks
    read, text = [], ""
    for chunk in chunks:  # up to the first with a text
        read.append(chunk)
        if text := chunk.text or "":
            break
    begun = added.unless_begun is not None and text.startswith(added.unless_begun)
    if begun or not (text or added.if_empty):
        return [], chain(read, chunks)
    after = TokenChunk(read[0].document, list(added.after), [""] * len(added.after), "")
    return list(added.before), chain(read, chunks, [after])


def _tokens(ids: tuple[int, ...]) -> str:
    return ("token " if len(ids) == 1 else "tokens ") + ", ".join(map(str, ids))
