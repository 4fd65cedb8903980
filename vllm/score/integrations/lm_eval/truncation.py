"""What to leave out of a text that is longer than the model's context."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vllm.score.errors import ScoreModeError

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# Token ids of a context and its continuation.
TokenPair = tuple[list[int], list[int]]

SIDES = ("left", "right", "middle")


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
    if side == "left":
        return ids[-room:]
    if side == "right":
        return ids[:room]
    first = room // 2
    return ids[:first] + ids[len(ids) - (room - first) :]
