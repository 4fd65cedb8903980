"""The bytes that tokens stand for, as their vocabulary writes them.

Two spellings tell them exactly. sentencepiece writes ▁ for a space, and <0x41> for the byte 0x41
where a character is not in the vocabulary. Byte-level vocabularies write every byte as one
character (Radford et al. 2019: printable bytes as themselves, the others from U+0100 on), so that a
space is Ġ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + rank): byte for rank, byte in enumerate(_OTHERS)
}
_SPACES = ("▁", "Ġ")


class TokenBytes:
    """Token id to bytes.

    Args:
        tokenizer: of Hugging Face or vLLM.

    Attributes:
        known: whether the vocabulary tells the bytes; nothing else works where it does not.
        dummy: whether the tokenizer puts a space of its own before a text.
        added: tokens that are found in a text before it is tokenised, special ones above all; the
            text behind them is tokenised as if it began there.
        greedy: those of `added` that also swallow white space around them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}
        self.added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", None) or {})
        self.greedy = {i for i, token in self.added.items() if token.lstrip or token.rstrip}
        convert = getattr(tokenizer, "convert_ids_to_tokens", None)
        tokens = convert(tokenizer.encode("a a", add_special_tokens=False)) if convert else []
        spelled = "".join(token for token in tokens if isinstance(token, str))
        self._space = next((space for space in _SPACES if space in spelled), None)
        self.known = self._space is not None
        first = tokenizer.encode("a", add_special_tokens=False)[:1]
        self.dummy = self.known and any(self(token).startswith(b" ") for token in first)

    def __call__(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read(token_id)
        return found

    def of_text(self, text: str) -> bytes:
        """A text in the bytes that tokens write; to sentencepiece, ▁ and a space are the same."""
        return (text.replace("▁", " ") if self._space == "▁" else text).encode()

    def _read(self, token_id: int) -> bytes:
        if token_id in self.added:
            token = str(self.added[token_id].content)
        else:
            token = str(self._tokenizer.convert_ids_to_tokens([token_id])[0])
        if self._space == "▁":
            byte = _BYTE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else self.of_text(token)
        if token_id in self.added or not _ALPHABET.keys() >= set(token):
            return token.encode()
        return bytes(_ALPHABET[character] for character in token)


def own_offsets(
    token_bytes: TokenBytes, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Offsets in which every byte token has the character that it is a part of.

    A unigram model of Hugging Face gives each byte of a run of unknown characters the offsets of
    the whole run.

    Args:
        ids, offsets: [n], (start, end) of each token in `text`.
    """
    found: list[tuple[int, int]] = []
    for (start, end), run in groupby(zip(offsets, ids, strict=True), key=lambda row: row[0]):
        tokens = [token for _, token in run]
        characters = text[start:end]
        if 1 < end - start <= len(tokens) and (
            b"".join(map(token_bytes, tokens)) == characters.encode()
        ):
            for place, character in enumerate(characters, start):
                found += [(place, place + 1)] * len(character.encode())
        else:
            found += [(start, end)] * len(tokens)
    return found
