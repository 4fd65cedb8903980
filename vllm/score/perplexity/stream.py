"""Windows of a token stream, one at a time: only what a window needs is kept of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np

from vllm.score.perplexity.plans import AddedTokens
from vllm.score.perplexity.tokenize import TokenChunk
from vllm.score.perplexity.windows import WindowPlan


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
    """

    def __init__(self, chunks: Iterable[TokenChunk]) -> None:
        self.documents = 0
        self.tokens = 0
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._chunks = iter(chunks)

    def sha256(self) -> str:
        """Of the text's UTF-8 bytes, documents separated by a zero byte; of the token ids as
        little-endian int64 where there is no text."""
        return self._hash.hexdigest()

    def windows(
        self,
        plan: WindowPlan,
        *,
        prefix: Iterable[int] = (),
        every_window: Iterable[int] = (),
        replace_first: int | None = None,
        added: AddedTokens | None = None,
    ) -> Iterator[Window]:
        """The windows of every document, in order; reads the stream to its end.

        Args:
            plan: made anew for every document.
            prefix: tokens put in front of each document, context only.
            every_window: tokens put in front of each window, context only.
            replace_first: token that takes the place of each window's first.
            added: tokens that each document gets besides its own, scored like them.
        """
        prefix, every_window = list(prefix), list(every_window)
        added = added or AddedTokens()
        index = 0
        for document, group in groupby(self._pass(), key=lambda chunk: chunk.document):
            base = self.tokens
            before, after, chunks = _added_to(group, added)
            front = len(prefix) + len(before)
            own = chain.from_iterable(self._count(chunk) for chunk in chunks)
            tokens = _DocumentTokens(prefix + before, chain(own, after))
            for span in plan.spans(tokens.ensure, lead=len(prefix)):
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
                    position=base + span.first_target - front,
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

    def _count(self, chunk: TokenChunk) -> Iterator[tuple[list[int], list[str] | None]]:
        self.tokens += len(chunk.ids)
        yield chunk.ids, chunk.texts


class _DocumentTokens:
    """The stream of one document, what is in front of it included: read on demand, forgotten from
    the front."""

    def __init__(
        self, front: list[int], chunks: Iterator[tuple[list[int], list[str] | None]]
    ) -> None:
        self._ids = list(front)
        self._texts: list[str | None] = [""] * len(front)
        self._begin = 0
        self._chunks = chunks

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
