"""Tokens of documents that arrive in pieces, as if each document were tokenised at once.

The tokenizer adds no special token: what stands in front of a text is said by the BOS rule.
Special tokens spelled out in the text are recognised, as tokenizer(text) does by default.

A document of a fast tokenizer is tokenised in overlapping blocks (`resync`), so it need not fit
in memory. Whole documents are needed by a slow tokenizer, which gives no offsets, and by a unigram
model that does not split at spaces.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import resync


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive tokens of one document.

    texts: for each token the characters it adds; put together they are `text`. A character made
        of several tokens stands with the first; what the tokenizer drops (a stripped space)
        stands with the token after it. None where the tokenizer gives no offsets.
    text: the characters of the chunk; None where there are only token ids.
    """

    document: int
    ids: list[int]
    texts: list[str] | None
    text: str | None


def tokenize_documents(
    tokenizer: Any,
    pieces: Iterable[tuple[int, str]],
    *,
    block: int = resync.BLOCK,
    overlap: int = resync.OVERLAP,
) -> Iterator[TokenChunk]:
    """Tokenise documents.

    Args:
        tokenizer: a Hugging Face tokenizer, or anything with `encode(text, add_special_tokens=)`.
        pieces: (document, text) pairs; the pieces of a document follow one another.
        block: characters tokenised at a time.
        overlap: characters tokenised twice, at least 32 and less than half of block.

    Yields:
        at least one chunk a document, an empty one for an empty document. The chunks depend on
        the documents alone, not on how they were cut into pieces.

    Raises:
        ScoreModeError: for text that cannot be encoded in UTF-8 (a lone surrogate).
    """
    for document, group in groupby(pieces, key=lambda piece: piece[0]):
        texts = (_encodable(text, document) for _, text in group)
        if getattr(tokenizer, "is_fast", False):
            separators = _separators(tokenizer)
            size = block if separators is not None else sys.maxsize
            encode = _offset_encoder(tokenizer)
            stream = resync.BlockStream(encode, texts, size, overlap, separators or "")
            for ids, token_texts, text in stream.chunks():
                yield TokenChunk(document, ids, token_texts, text)
        else:
            whole = "".join(texts)
            ids = list(tokenizer.encode(whole, add_special_tokens=False)) if whole else []
            yield TokenChunk(document, ids, None, whole)


def limit_tokens(chunks: Iterable[TokenChunk], max_tokens: int | None) -> Iterator[TokenChunk]:
    """The chunks up to the first `max_tokens` tokens in all, the last one cut to fit."""
    if max_tokens is None:
        yield from chunks
        return
    left = max_tokens
    for chunk in chunks:
        if len(chunk.ids) < left:
            yield chunk
            left -= len(chunk.ids)
            continue
        texts = None if chunk.texts is None else chunk.texts[:left]
        text = chunk.text if texts is None else "".join(texts)
        yield TokenChunk(chunk.document, chunk.ids[:left], texts, text)
        return


def automatic_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that tokenizer(text) puts in front of a text by itself (often a BOS)."""
    return automatic_tokens(tokenizer)[0]


def automatic_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that tokenizer(text) adds by itself, in front of a text and behind it."""
    probe = "a"
    plain = list(tokenizer.encode(probe, add_special_tokens=False))
    full = list(tokenizer.encode(probe, add_special_tokens=True))
    for start in range(len(full) - len(plain) + 1):
        end = start + len(plain)
        if plain and full[start:end] == plain:
            return full[:start], full[end:]
    return [], []


def _separators(tokenizer: Any) -> str | None:
    """Before which whitespace a text can be cut ("": any); None: nowhere.

    BPE and word pieces go by ranks, which say the same wherever a word stands. A unigram model
    adds up float64 scores from the beginning of a word, and a tie can fall either way with the
    rounding, so that only whole words will do: those its pre-tokenizer makes.
    """
    backend = tokenizer.backend_tokenizer
    if type(backend.model).__name__ != "Unigram":
        return ""
    words = backend.pre_tokenizer and backend.pre_tokenizer.pre_tokenize_str("a b")
    return " " if words and len(words) > 1 else None


def _offset_encoder(tokenizer: Any) -> resync.Encode:
    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # no warning that a text is longer than the model
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    return encode


def _encodable(text: str, document: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ScoreModeError(
            f"document {document} has a lone surrogate ({text[error.start]!r}), which is no "
            "character and has no UTF-8 form; remove or replace it"
        ) from None
    return text
