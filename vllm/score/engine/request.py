"""Admission of a score request: from what the user gave to what the engine computes.

The engine receives the prompt without its last token. That token's own row is never scored, so
nothing is lost, a token of work is saved, and a prompt may be as long as the model's context.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm.score.engine.invalid import InvalidScoreRequest
from vllm.score.engine.token_ids import as_sequence, read_token_id_rows, read_token_ids
from vllm.score.ops.row_layout import FULL_VOCABULARY, MAX_EXACT_ID, RowLayout
from vllm.score.tokens import own_prefix_note, prefix_once

FULL_VOCABULARY_BYTES_VARIABLE = "VLLM_SCORE_FULL_VOCAB_BYTES"
DEFAULT_FULL_VOCABULARY_BYTES = 4 << 30

# In the engine's input: the plan that `score()` made when it checked all requests.
PLAN = "score_plan"

# Attribute of sampling parameters whose prompt must stay as vLLM has tokenised it: an ordinary
# request of a client that does not know of score mode.
AS_TOKENISED = "score_as_tokenised"


@dataclass(frozen=True)
class ModelFacts:
    """What admission needs to know of the model and the front end.

    Attributes:
        max_logprobs: values a position that a client may ask for; None: no limit. A server keeps
            vLLM's own limit for its clients, `LLM` has none.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int | None = None


@dataclass(frozen=True, eq=False)
class ScorePlan:
    """One admitted request.

    Attributes:
        prompt_token_ids: the whole prompt, [n].
        ids: the same as an array, int64 [n].
        targets: int32 [m, k]; the last m positions are scored.
        flat: targets were given as a flat list, so results are [m] instead of [m, k].
        layout: the columns that come back.
        vocab_size: V.
        notes: for whoever reads the result.
        view_ranks: the statistic `rank` was not asked for: it is the view's.
    """

    prompt_token_ids: list[int]
    ids: np.ndarray
    targets: np.ndarray
    flat: bool
    layout: RowLayout
    vocab_size: int
    notes: tuple[str, ...] = ()
    view_ranks: bool = False

    @property
    def first_position(self) -> int:
        """Prompt position of the first scored token."""
        return len(self.prompt_token_ids) - len(self.targets)

    @property
    def engine_prompt(self) -> list[int]:
        """What the engine computes: all but the last token (a single token is kept)."""
        ids = self.prompt_token_ids
        return ids[:-1] if len(ids) > 1 else ids

    @property
    def first_row(self) -> int:
        """Engine prompt position whose hidden state scores the first target."""
        return max(self.first_position - 1, 0)

    @property
    def result_shape(self) -> tuple[int, int]:
        return len(self.targets), self.layout.width(self.vocab_size)


def full_vocabulary_limit() -> int:
    """Bytes that the full-vocabulary results of unfinished requests may take together."""
    text = os.environ.get(FULL_VOCABULARY_BYTES_VARIABLE)
    if text is None:
        return DEFAULT_FULL_VOCABULARY_BYTES
    try:
        return int(text)
    except ValueError:
        raise InvalidScoreRequest(
            f"{FULL_VOCABULARY_BYTES_VARIABLE}={text!r} is not a whole number of bytes.",
            parameter=FULL_VOCABULARY_BYTES_VARIABLE,
        ) from None


def plan_request(
    prompt_token_ids: Sequence[int],
    target_token_ids: Any,
    params: Any,
    facts: ModelFacts,
    bytes_in_use: int = 0,
    notes: tuple[str, ...] = (),
    view: bool = False,
) -> ScorePlan:
    """Check one score request and say what the engine is to compute.

    Args:
        prompt_token_ids: [n] ids.
        target_token_ids: None, m ids, or m lists of k ids, for the last m positions.
        params: `SamplingParams` with `score_mode=True`.
        facts: of the model and front end.
        bytes_in_use: full-vocabulary results already admitted and not finished.
        notes: what the result is to say of the prompt.
        view: somebody may read the results as stock prompt log-probabilities, which have ranks.

    Raises:
        InvalidScoreRequest: (a ValueError) naming the field, the value and the remedy.
    """
    ids, array = _prompt_ids(prompt_token_ids, facts)
    top = _top(params, target_token_ids)
    if target_token_ids is None:
        targets, flat = array[1:, None].astype(np.int32), True
    else:
        targets, flat = _targets(target_token_ids, len(ids), facts.vocab_size)
    statistics = tuple(params.score_statistics or ())
    # Of whole rows the view counts them itself.
    view_ranks = view and top != FULL_VOCABULARY and "rank" not in statistics
    if not len(targets):
        notes += ("the prompt is one token, which has no context: nothing was scored",)
    layout = RowLayout(
        num_targets=0 if top == FULL_VOCABULARY else targets.shape[1],
        statistics=(*statistics, "rank") if view_ranks else statistics,
        top=top,
        temperature=params.score_temperature,
        top_p=params.score_top_p,
    )
    plan = ScorePlan(ids, array, targets, flat, layout, facts.vocab_size, notes, view_ranks)
    _check_values_a_position(plan, facts)
    if top == FULL_VOCABULARY:
        _check_bytes(plan, bytes_in_use)
    return plan


def plan_tokenised(
    engine_input: Mapping[str, Any],
    target_token_ids: Any,
    params: Any,
    facts: ModelFacts,
    tokenizer: Any,
    bytes_in_use: int = 0,
    view: bool = False,
) -> ScorePlan:
    """`plan_request` for a prompt that vLLM has tokenised, with its special tokens in front once.

    Args:
        engine_input: with "prompt_token_ids", and "prompt" where they come from a text.
        tokenizer: of the engine.
    """
    ids: list[int] = engine_input["prompt_token_ids"]
    notes: tuple[str, ...] = ()
    text = engine_input.get("prompt")
    if isinstance(text, str) and tokenizer is not None and not hasattr(params, AS_TOKENISED):
        ids, own = prefix_once(tokenizer, text, ids)
        notes = (own_prefix_note(tokenizer),) if own else ()
    return plan_request(ids, target_token_ids, params, facts, bytes_in_use, notes, view)


def _prompt_ids(prompt_token_ids: Sequence[int], facts: ModelFacts) -> tuple[list[int], np.ndarray]:
    """The checked ids, as a list and as an array [n]."""
    field = "prompt_token_ids"
    given = as_sequence(prompt_token_ids, field, "a list of token ids")
    if len(given) == 0:
        raise InvalidScoreRequest(
            "the prompt has no token; give a text that is not empty, or at least one token id.",
            parameter=field,
        )
    if len(given) > facts.max_model_len:
        raise InvalidScoreRequest(
            f"{field} has {len(given)} tokens, the engine's max_model_len is "
            f"{facts.max_model_len}: shorten the prompt or score it in windows "
            "(vllm.score.perplexity).",
            parameter=field,
            value=len(given),
        )
    if facts.vocab_size > MAX_EXACT_ID:
        raise InvalidScoreRequest(
            f"the model's vocabulary of {facts.vocab_size} exceeds score mode's {MAX_EXACT_ID}."
        )
    checked = read_token_ids(given, facts.vocab_size, field)
    return checked.tolist(), checked


def _targets(given: Any, prompt_len: int, vocab_size: int) -> tuple[np.ndarray, bool]:
    field = "target_token_ids"
    what = "a list of token ids, or a list of lists for several candidates a position"
    given = as_sequence(given, field, what)
    if len(given) == 0:
        raise InvalidScoreRequest(
            f"{field} is empty: leave it out to score the whole prompt.", parameter=field, value=[]
        )
    if len(given) > prompt_len - 1:
        raise InvalidScoreRequest(
            f"{field} has {len(given)} rows, but a prompt of {prompt_len} tokens has "
            f"{prompt_len - 1} positions with a context; the targets are aligned to its end.",
            parameter=field,
            value=len(given),
        )
    rows = read_token_id_rows(given, vocab_size, field)
    flat = rows.ndim == 1
    return np.ascontiguousarray(rows[:, None] if flat else rows, dtype=np.int32), flat


def _top(params: Any, target_token_ids: Any) -> int:
    asked = params.prompt_logprobs
    if asked is not None and asked < FULL_VOCABULARY:
        raise InvalidScoreRequest(
            f"prompt_logprobs must be -1 or at least 0, got {asked}.",
            parameter="prompt_logprobs",
            value=asked,
        )
    if target_token_ids is None:
        return FULL_VOCABULARY if asked is None else int(asked)
    if asked == FULL_VOCABULARY:
        raise InvalidScoreRequest(
            "prompt_logprobs=-1 (the whole vocabulary) and target_token_ids exclude each other: "
            "leave one of them out.",
            parameter="prompt_logprobs",
            value=asked,
        )
    return int(asked or 0)


def _check_values_a_position(plan: ScorePlan, facts: ModelFacts) -> None:
    top = plan.layout.top
    if top > plan.vocab_size:
        raise InvalidScoreRequest(
            f"prompt_logprobs is {top}, the vocabulary has {plan.vocab_size} tokens.",
            parameter="prompt_logprobs",
            value=top,
        )
    if facts.max_logprobs is None or facts.max_logprobs == -1:
        return
    asked = plan.vocab_size if top == FULL_VOCABULARY else max(top, plan.targets.shape[1])
    if asked > facts.max_logprobs:
        field = "target_token_ids" if 0 <= top < asked else "prompt_logprobs"
        raise InvalidScoreRequest(
            f"{field} asks for {asked} values a position, this server allows max_logprobs="
            f"{facts.max_logprobs}: name the tokens in target_token_ids, or start the server with "
            "a larger --max-logprobs.",
            parameter=field,
            value=asked,
        )


def _check_bytes(plan: ScorePlan, bytes_in_use: int) -> None:
    rows, width = plan.result_shape
    needed, limit = 4 * rows * width, full_vocabulary_limit()
    if bytes_in_use + needed > limit:
        raise InvalidScoreRequest(
            f"the whole vocabulary of {plan.vocab_size} tokens at {rows} positions takes "
            f"{needed:,} bytes, with {bytes_in_use:,} in use by unfinished requests more than the "
            f"limit of {limit:,} bytes: name the tokens that you need in target_token_ids, send "
            f"fewer requests at once, or raise {FULL_VOCABULARY_BYTES_VARIABLE}.",
            parameter="target_token_ids",
            value=needed,
        )
