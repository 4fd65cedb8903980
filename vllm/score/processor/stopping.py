"""Where a response ends: at the answer's closing tag, or at an end-of-sequence token."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

TAG = "</answer>"
# Tokens of the tail that is looked through at every step: more than the tag's nine characters can
# take, with room for tokens without text among them.
TAIL = 32


def eos_token_ids(tokenizer: Any, of_model: Any) -> list[int]:
    """All ids that end a sequence, the tokenizer's (if it names one) first.

    Args:
        of_model: `eos_token_id` of the model's generation_config: None, one or several.
    """
    more = [of_model] if isinstance(of_model, Integral) else of_model or []
    listed = [tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(int(token) for token in listed if token is not None))


class StopAfterAnswer:
    """Leaves nothing but the end-of-sequence token to a row whose response contains the tag.

    A logits processor of transformers. The text decides, not the tokens: how a tag is split depends
    on what stands around it. A tag in the prompt, or one begun there, does not count.

    Args:
        prompt_length: columns of the padded prompts.
        tokenizer: decodes the ids.
        eos_token_id: what is left.
    """

    def __init__(self, prompt_length: int, tokenizer: Any, eos_token_id: int) -> None:
        self.prompt_length = prompt_length
        self.tokenizer = tokenizer
        self.eos_token_id = eos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids int64 [R, L], scores [R, V]; returns [R, V]."""
        rows = input_ids[:, self.prompt_length :].tolist()
        ended = [
            has_tag(row[-TAIL:], self.tokenizer) and has_tag(row, self.tokenizer) for row in rows
        ]
        if not any(ended):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[:, self.eos_token_id] = 0.0
        return torch.where(torch.tensor(ended, device=scores.device)[:, None], only, scores)


def response_length(ids: Sequence[int], tokenizer: Any, eos_token_ids: Collection[int]) -> int:
    """How many of the generated tokens are the response.

    Up to the token that completes the first tag, or the first end-of-sequence token, itself
    included, whichever comes first; otherwise all. The end-of-sequence token that `StopAfterAnswer`
    forces behind a tag is no part of it: the policy did not draw it.

    Args:
        ids: generated tokens of one row, with whatever follows the response.
        tokenizer: decodes the ids.
        eos_token_ids: all end-of-sequence tokens.
    """
    end = next((n for n, token in enumerate(ids, start=1) if token in eos_token_ids), len(ids))
    given = list(ids[:end])
    if not has_tag(given, tokenizer):
        return end
    return bisect_left(range(end), True, key=lambda n: has_tag(given[:n], tokenizer))


def has_tag(ids: list[int], tokenizer: Any) -> bool:
    """Whether the text of the ids, special tokens left out, contains the tag."""
    return TAG in tokenizer.decode(ids, skip_special_tokens=True)
