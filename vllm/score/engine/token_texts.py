"""Texts of single token ids, also of those that the tokenizer does not have.

A model's vocabulary may be larger than its tokenizer's: padded for the hardware, or with reserved
ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import wrapt

# Attribute of sampling parameters whose generated tokens, too, may be any id of the model: the
# stock code that decodes alternatives takes the whole server down at one without a text.
ANY_ID = "score_any_id"

# What tokenizers raise for an id that they lack.
UNKNOWN_ID = (IndexError, KeyError, OverflowError, TypeError, ValueError)


class EveryId(wrapt.ObjectProxy):
    """A tokenizer for which ids that it lacks are empty texts."""

    def convert_ids_to_tokens(self, ids: Sequence[int], **options: Any) -> list[str]:
        """The tokens [n] of ids [n]."""
        return [self._token(token_id, **options) for token_id in ids]

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of one id or several; those that the tokenizer lacks add nothing."""
        try:
            return str(self.__wrapped__.decode(ids, **options))
        except UNKNOWN_ID:
            known = [i for i in ([ids] if isinstance(ids, int) else ids) if self._token(i)]
            return str(self.__wrapped__.decode(known, **options)) if known else ""

    def _token(self, token_id: int, **options: Any) -> str:
        try:
            return self.__wrapped__.convert_ids_to_tokens([token_id], **options)[0] or ""
        except UNKNOWN_ID:
            return ""


def decoder(tokenizer: Any) -> Callable[[int], str] | None:
    """Token id to text, as vLLM decodes single ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    every = EveryId(tokenizer)

    def decode(token_id: int) -> str:
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        return convert_ids_list_to_tokens(every, [token_id])[0]

    return decode
