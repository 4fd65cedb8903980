"""Texts to token ids, and (context, continuation) texts to token pairs as lm-eval cuts them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.truncation import TokenPair
from vllm.score.sequence.boundary import BoundaryTokenizer, Pair

# Texts that the tokenizer is given at a time; between them the progress bar moves.
BATCH = 512


class Encoder:
    """A tokenizer with lm-eval's rules about special tokens.

    Args:
        tokenizer: Hugging Face's, or vLLM's in its form.
        add_bos_token: True or False: with or without the special tokens; None leaves it to the
            tokenizer. A text that already starts with the prefix token gets none, unless the call
            itself asks for them.
        prefix_token_id: the context of texts without one; by default BOS, else EOS.
    """

    def __init__(
        self, tokenizer: Any, add_bos_token: bool | None, prefix_token_id: int | None
    ) -> None:
        self._tokenizer = tokenizer
        self._add_bos_token = add_bos_token
        ids = (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        self._prefix = next((i for i in ids if i is not None), None)
        self._boundary = BoundaryTokenizer(tokenizer, "spanning")
        self._prefix_text = None if self._prefix is None else tokenizer.decode([self._prefix])

    @property
    def prefix_token_id(self) -> int:
        """Raises ScoreModeError where the tokenizer has neither BOS nor EOS."""
        if self._prefix is None:
            raise ScoreModeError(
                "the tokenizer has neither a BOS nor an EOS token, and a text without context "
                "needs one before it: name a token by prefix_token_id=N."
            )
        return self._prefix

    def encode(
        self, texts: Sequence[str], add_special_tokens: bool | None = None
    ) -> list[list[int]]:
        """Token ids of each text.

        Raises:
            ScoreModeError: something is no text.
        """
        for text in texts:
            _check_text(text)
        asked = self._add_bos_token if add_special_tokens is None else add_special_tokens
        special: dict[str, bool] = {} if asked is None else {"add_special_tokens": asked}
        prefix = self._prefix_text if add_special_tokens is None else None
        begun = [prefix is not None and text.startswith(prefix) for text in texts]
        found: list[list[int]] = [[] for _ in texts]
        for group, options in ((False, special), (True, {"add_special_tokens": False})):
            chosen = [i for i, b in enumerate(begun) if b is group]
            if chosen:
                encoded = self._tokenizer([texts[i] for i in chosen], **options)["input_ids"]
                for i, ids in zip(chosen, encoded, strict=True):
                    found[i] = ids
        return found

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], disable_tqdm: bool = False
    ) -> list[TokenPair]:
        """Token ids of contexts and continuations, the same that lm-eval's own models score.

        lm-eval gives the white space at the end of a context to the continuation, encodes both
        together, and cuts where the context by itself would end. Where that leaves nothing of the
        continuation (it has merged with the end of the context), it is scored from the token that
        spans the boundary on. A continuation without any token (an empty text) stays empty.
        """
        for pair in pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ScoreModeError(f"{pair!r:.60} is no (context, continuation).")
            _check_text(pair[0])
            _check_text(pair[1])
        kept = [context.rstrip() for context, _ in pairs]
        with tqdm(desc="Tokenizing inputs", unit=" texts", disable=disable_tqdm) as bar:
            alone = self._encode_once((t for c, t in pairs if not c), False, bar)
            wholes = self._encode_once((c + t for c, t in pairs if c), None, bar)
            heads = (k for k, (c, _) in zip(kept, pairs, strict=True) if c)
            contexts = self._encode_once(heads, None, bar)
        return [
            self._cut(contexts[k], wholes[c + t], k, (c + t)[len(k) :])
            if c
            else self._after_prefix(alone[t])
            for k, (c, t) in zip(kept, pairs, strict=True)
        ]

    def _encode_once(
        self, texts: Iterable[str], add_special_tokens: bool | None, bar: tqdm
    ) -> dict[str, list[int]]:
        """Token ids by text."""
        unique = list(dict.fromkeys(texts))
        found: dict[str, list[int]] = {}
        for first in range(0, len(unique), BATCH):
            batch = unique[first : first + BATCH]
            found.update(zip(batch, self.encode(batch, add_special_tokens), strict=True))
            bar.update(len(batch))
        return found

    def _cut(self, context: list[int], whole: list[int], head: str, rest: str) -> TokenPair:
        if not context:
            return self._after_prefix(whole)
        if len(whole) > len(context):
            return context, whole[len(context) :]
        templated = self._add_bos_token is False
        try:
            (split,) = self._boundary.split([Pair(head, rest, templated=templated)])
        except ScoreModeError:  # nothing of the continuation has a token
            return context, []
        return split.token_ids[: split.start], split.token_ids[split.start :]

    def _after_prefix(self, ids: list[int]) -> TokenPair:
        """A text without context follows the prefix token, which may be its own first one."""
        if len(ids) > 1 and ids[0] == self._prefix:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ScoreModeError(f"a text is {text!r:.60}, a {type(text).__name__}; give a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ScoreModeError(
            f"a text has a lone surrogate ({text[error.start]!r}), which is no character and has "
            "no UTF-8 form; remove or replace it."
        ) from None
