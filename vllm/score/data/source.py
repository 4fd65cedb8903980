"""Texts to be scored, as documents that arrive in pieces and can be read more than once."""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable

Piece = tuple[int, str]  # (number of the document, the next part of it)


class Source(ABC):
    """Documents of text.

    name: for reports.
    skip_empty: whether rows without a text are left out.
    """

    name: str
    skip_empty: bool = False

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """(document, text) pairs from the beginning; documents are numbered from 0 without gaps,
        and the pieces of one follow each other. An empty document is one empty piece."""

    def check(self) -> None:
        """Read all of it once, so that a fault at its end is found before anything runs.

        Raises:
            ScoreModeError: it cannot be read, or is no text.
        """
        for document, text in self.pieces():
            check_encodable(text, f"document {document}")

    def notes(self) -> list[str]:
        """Sentences for whoever reads the results, after `pieces` has been read."""
        return []

    def content_sha256(self) -> str | None:
        """Hash of the whole content, where reading it beforehand is cheap; else None."""
        return None

    def size_bytes(self) -> int | None:
        """Bytes of UTF-8 in all documents, at least roughly; None if not known."""
        return None


class TextSource(Source):
    """One text in memory."""

    def __init__(self, text: str, name: str = "text") -> None:
        self.name = name
        self._text = text

    def pieces(self) -> Iterator[Piece]:
        yield 0, self._text

    def content_sha256(self) -> str | None:
        return hashlib.sha256(_utf8(self._text)).hexdigest()

    def size_bytes(self) -> int | None:
        return len(_utf8(self._text))


class DocumentsSource(Source):
    """Documents in memory."""

    def __init__(self, documents: Sequence[str], name: str = "documents") -> None:
        for index, document in enumerate(documents):
            if not isinstance(document, str):
                raise ScoreModeError(
                    f"documents[{index}] is {type(document).__name__}, not str; pass texts, or "
                    "token ids alone"
                )
        self.name = name
        self._documents = documents

    def pieces(self) -> Iterator[Piece]:
        yield from enumerate(self._documents)

    def content_sha256(self) -> str | None:
        digest = hashlib.sha256()
        for document in self._documents:
            data = _utf8(document)
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.hexdigest()

    def size_bytes(self) -> int | None:
        return sum(len(_utf8(document)) for document in self._documents)


class TokenIdsSource(Source):
    """Token ids, taken as they are: nothing is put in front but what a BOS rule says.

    documents: the ids of each document.
    """

    def __init__(self, documents: Sequence[Sequence[int]], name: str = "token ids") -> None:
        self.name = name
        self.documents = [[int(token) for token in document] for document in documents]

    def pieces(self) -> Iterator[Piece]:
        raise ScoreModeError("this source has token ids and no text")

    def check(self) -> None:
        pass

    def content_sha256(self) -> str | None:
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


class SpooledSource(Source):
    """Pieces that can be produced only once, kept in a temporary file for reading again.

    The file is as long as what has been read.
    """

    def __init__(self, pieces: Iterable[Piece], name: str) -> None:
        self.name = name
        self._rest = iter(pieces)
        self._spool: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._end = 0
        self._checked = False

    def check(self) -> None:
        if not self._checked:
            super().check()
            self._checked = True

    def pieces(self) -> Iterator[Piece]:
        position = 0
        while True:
            while position < self._end:
                self._spool.seek(position)
                document, text = json.loads(self._spool.readline())
                position = self._spool.tell()
                yield document, text
            piece = next(self._rest, None)
            if piece is None:
                return
            self._spool.seek(self._end)
            self._spool.write(json.dumps(piece) + "\n")
            self._end = self._spool.tell()


def _utf8(text: str) -> bytes:
    # A lone surrogate is refused where the text is tokenised, with the document's number.
    return text.encode("utf-8", errors="surrogatepass")


def documents_as_pieces(documents: Iterable[Any], what: str) -> Iterator[Piece]:
    """Number the documents; raise ScoreModeError for one that is no text."""
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise ScoreModeError(
                f"{what}: document {index} is {document!r:.80} ({type(document).__name__}), not "
                "text; choose another text column"
            )
        yield index, document
