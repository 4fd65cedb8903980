"""From the texts of lm-eval's requests to token ids that fit the model.

(context, continuation) texts are cut as lm-eval's own models cut them, and what is too long is left
out as they leave it out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from tqdm import tqdm

from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import BoundaryTokenizer, Pair
from vllm.score.tokens import check_encodable

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# Token ids of a context and its continuation.
TokenPair = tuple[list[int], list[int]]

# Texts that the tokenizer is given at a time; between them the progress bar moves.
BATCH = 512
SIDES = ("left", "right", "middle")


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
        self, texts: Iterable[str], add_special_tokens: bool | None = None, bar: Any = None
    ) -> list[list[int]]:
        """Token ids of each text.

        Args:
            bar: of tqdm, moved by the number of different texts.

        Raises:
            ScoreModeError: something is no text.
        """
        texts = list(texts)
        for text in texts:
            _check_text(text)
        asked = self._add_bos_token if add_special_tokens is None else add_special_tokens
        special: dict[str, bool] = {} if asked is None else {"add_special_tokens": asked}
        prefix = self._prefix_text if add_special_tokens is None else None
        unique = list(dict.fromkeys(texts))
        found: dict[str, list[int]] = {}
        for first in range(0, len(unique), BATCH):
            batch = unique[first : first + BATCH]
            begun = [text for text in batch if prefix is not None and text.startswith(prefix)]
            others = [text for text in batch if prefix is None or not text.startswith(prefix)]
            for group, options in ((others, special), (begun, {"add_special_tokens": False})):
                if group:
                    encoded = self._tokenizer(group, **options)["input_ids"]
                    found.update(zip(group, encoded, strict=True))
            if bar is not None:
                bar.update(len(batch))
        return [found[text] for text in texts]

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
        with tqdm(desc="Tokenizing inputs", unit=" texts", disable=disable_tqdm) as bar:
            alone = iter(self.encode((t for c, t in pairs if not c), False, bar))
            wholes = iter(self.encode((c + t for c, t in pairs if c), None, bar))
            heads = iter(self.encode((c.rstrip() for c, _ in pairs if c), None, bar))
        return [
            self._cut(next(heads), next(wholes), c, t) if c else self._after_prefix(next(alone))
            for c, t in pairs
        ]

    def _cut(self, head: list[int], whole: list[int], context: str, text: str) -> TokenPair:
        if not head:
            return self._after_prefix(whole)
        if len(whole) > len(head):
            return head, whole[len(head) :]
        kept = context.rstrip()
        pair = Pair(kept, context[len(kept) :] + text, templated=self._add_bos_token is False)
        try:
            (split,) = self._boundary.split([pair])
        except ScoreModeError:  # nothing of the continuation has a token
            return head, []
        return split.token_ids[: split.start], split.token_ids[split.start :]

    def _after_prefix(self, ids: list[int]) -> TokenPair:
        """A text without context follows the prefix token, which may be its own first one."""
        if len(ids) > 1 and ids[0] == self._prefix:
            return ids[:1], ids[1:]
        return [self.prefix_token_id], ids


def fit_pairs(pairs: Sequence[TokenPair], max_length: int) -> list[TokenPair]:
    """Drop the first tokens of contexts that are too long, and say of how many.

    Args:
        pairs: (context, continuation) token ids.
        max_length: tokens that the model reads at most. The last token of a continuation is
            predicted, not read: both may have max_length + 1 tokens together.

    Raises:
        ScoreModeError: a continuation has more than max_length tokens.
    """
    fitting, longest, shortened = [], 0, 0
    for context, continuation in pairs:
        read = len(context) + len(continuation) - 1
        if read > max_length:
            if len(continuation) > max_length:
                raise ScoreModeError(
                    f"a continuation has {len(continuation)} tokens, more than can be predicted "
                    f"with max_model_len={max_length}: raise max_model_len, or make the task a "
                    "loglikelihood_rolling one."
                )
            longest, shortened = max(longest, read), shortened + 1
            context = context[read - max_length :]
        fitting.append((context, continuation))
    if shortened:
        logger.warning(
            "%d of %d requests are longer than max_model_len=%d (the longest reads %d tokens): the "
            "first tokens of their contexts are left out.",
            shortened,
            len(pairs),
            max_length,
            longest,
        )
    return fitting


def fit_context(ids: list[int], room: int, side: str) -> list[int]:
    """At most `room` tokens of a context, without its left, right or middle part."""
    if len(ids) <= room:
        return ids
    logger.warning(
        "A context of %d tokens is cut to the %d that leave room for max_gen_toks (truncation_side="
        "%s).",
        len(ids),
        room,
        side,
    )
    first = {"left": 0, "right": room, "middle": room // 2}[side]
    return ids[:first] + ids[len(ids) - (room - first) :]


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ScoreModeError(f"a text is {text!r:.60}, a {type(text).__name__}; give a str.")
    check_encodable(text, "a text")
