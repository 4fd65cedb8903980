"""Windows of a token stream, one at a time: only what a window needs is kept of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np

from vllm.score.perplexity.plans import AddedTokens, ScoringPlan
from vllm.score.perplexity.tokenize import TokenChunk
from vllm.score.perplexity.windows import WindowPlan
from vllm.score.tokens import own_prefix_length


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

    Args:
        chunks: the tokens, document by document.

    Attributes:
        documents, tokens, bytes: how much has passed (bytes: of UTF-8).
        own_prefixes, own_prefix_tokens: documents that began with the prefix themselves, and the
            tokens of it that they wrote: context, never scored.
        inner_prefixes: how often the prefix's first token stood elsewhere in a text.
    """

    def __init__(self, chunks: Iterable[TokenChunk]) -> None:
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self.own_prefixes = 0
        self.own_prefix_tokens = 0
        self.inner_prefixes = 0
        self._hash = hashlib.sha256()
        self._chunks = iter(chunks)

    def sha256(self) -> str:
        """Of the text's UTF-8 bytes, documents separated by a zero byte; of the token ids as
        little-endian int64 where there is no text."""
        return self._hash.hexdigest()

    def windows_of(self, plan: ScoringPlan) -> Iterator[Window]:
        """The windows of every document under a complete plan."""
        return self.windows(
            plan.windows,
            prefix=plan.prefix,
            every_window=plan.every_window,
            replace_first=plan.replace_first,
            prefix_once=plan.prefix_once,
            added=plan.added,
        )

    def windows(
        self,
        plan: WindowPlan,
        *,
        prefix: Iterable[int] = (),
        every_window: Iterable[int] = (),
        replace_first: int | None = None,
        prefix_once: bool = False,
        added: AddedTokens | None = None,
    ) -> Iterator[Window]:
        """The windows of every document, in order; reads the stream to its end.

        Args:
            plan: made anew for every document.
            prefix: tokens put in front of each document, context only.
            every_window: tokens put in front of each window, context only.
            replace_first: token that takes the place of each window's first.
            prefix_once: a document that begins with the prefix (or with `every_window`) itself
                gets none in front; what it wrote of it is context only.
            added: tokens that each document gets besides its own, scored like them.
        """
        prefix, every_window = list(prefix), list(every_window)
        once = (prefix or every_window) if prefix_once else []
        added = added or AddedTokens()
        index = 0
        for document, group in groupby(self._pass(), key=lambda chunk: chunk.document):
            base, front = self.tokens, prefix
            before, after, chunks = _added_to(group, added)
            counted = chain.from_iterable(self._count(c, once) for c in chunks)
            tokens = _DocumentTokens(chain(counted, after))
            own = own_prefix_length(tokens.first(len(once)), once)
            if own:
                self.own_prefixes += 1
                self.own_prefix_tokens += own
                self.inner_prefixes -= 1
                front = []
            if own and every_window:  # which stands in front of the first window, too
                tokens.remove(own)
                base += own
            lead = 0 if every_window else own or len(front)
            front = front + before
            tokens.put_in_front(front)
            for span in plan.spans(tokens.ensure, lead=lead):
                ids, texts = tokens.slice(span.begin, span.end)
                skipped = span.first_target - span.begin
                if replace_first is not None:
                    ids = [replace_first, *ids[1:]]
                targets = texts[skipped:]
                yield Window(
                    index=index,
                    document=document,
                    token_ids=every_window + ids,
                    num_targets=span.num_targets,
                    position=base + span.first_target - len(front),
                    texts=_all_known(targets),
                )
                index += 1
                tokens.release(span.begin)
            tokens.drain()

    def _pass(self) -> Iterator[TokenChunk]:
        previous = None
        for chunk in self._chunks:
            if chunk.document != previous:
                if previous is not None:
                    self._hash.update(b"\0")
                self.documents += 1
                previous = chunk.document
            if chunk.text is None:
                self._hash.update(np.asarray(chunk.ids, dtype="<i8").tobytes())
            else:
                data = chunk.text.encode("utf-8")
                self._hash.update(data)
                self.bytes += len(data)
            yield chunk

    def _count(
        self, chunk: TokenChunk, prefix: Sequence[int]
    ) -> Iterator[tuple[list[int], list[str] | None]]:
        self.tokens += len(chunk.ids)
        if prefix:
            self.inner_prefixes += chunk.ids.count(prefix[0])
        yield chunk.ids, chunk.texts


class _DocumentTokens:
    """The stream of one document, what is in front of it included: read on demand, forgotten from
    the front."""

    def __init__(self, chunks: Iterator[tuple[list[int], list[str] | None]]) -> None:
        self._ids: list[int] = []
        self._texts: list[str | None] = []
        self._begin = 0
        self._chunks = chunks

    def first(self, count: int) -> list[int]:
        """The first tokens, nothing forgotten yet."""
        return self._ids[: self.ensure(count)]

    def remove(self, count: int) -> None:
        """Take the first tokens out of the stream."""
        del self._ids[:count]
        del self._texts[:count]

    def put_in_front(self, prefix: list[int]) -> None:
        self._ids[:0] = prefix
        self._texts[:0] = [""] * len(prefix)

    def ensure(self, wanted: int) -> int:
        while self._begin + len(self._ids) < wanted and self._read():
            pass
        return min(wanted, self._begin + len(self._ids))

    def slice(self, begin: int, end: int) -> tuple[list[int], list[str | None]]:
        part = slice(begin - self._begin, end - self._begin)
        return self._ids[part], self._texts[part]

    def release(self, begin: int) -> None:
        """Tokens before `begin` will not be asked for again."""
        del self._ids[: begin - self._begin]
        del self._texts[: begin - self._begin]
        self._begin = begin

    def drain(self) -> None:
        self._ids, self._texts = [], []
        while self._read():
            self._ids, self._texts = [], []

    def _read(self) -> bool:
        chunk = next(self._chunks, None)
        if chunk is None:
            return False
        ids, texts = chunk
        self._ids += ids
        self._texts += texts if texts is not None else [None] * len(ids)
        return True


def _added_to(
    chunks: Iterable[TokenChunk], added: AddedTokens
) -> tuple[list[int], list[tuple[list[int], list[str] | None]], Iterable[TokenChunk]]:
    """What a document gets in front and (as a chunk or none) behind, and its chunks again."""
    if not added:
        return [], [], chunks
    chunks, read, text = iter(chunks), [], ""
    for chunk in chunks:  # up to the first with a text
        read.append(chunk)
        if text := chunk.text or "":
            break
    chunks = chain(read, chunks)
    begun = added.unless_begun is not None and text.startswith(added.unless_begun)
    if begun or not (text or added.if_empty):
        return [], [], chunks
    after = list(added.after)
    return list(added.before), [(after, [""] * len(after))] if after else [], chunks


def _all_known(texts: list[str | None]) -> list[str] | None:
    known = [text for text in texts if text is not None]
    return known if len(known) == len(texts) else None
