"""The score fields in the body of a completion request.

Beside the stock fields a body may hold:

=====================  ========================================================================
``score_mode``         true: score the prompt, generate nothing (``max_tokens`` is ignored)
``target_token_ids``   for one prompt: m token ids, or m lists of k candidates, for its last m
                       positions; for a list of prompts: a list with that (or null) for each
``score_statistics``   names, see `vllm.score.engine.statistics`
``score_temperature``  divides the logits
``score_top_p``        keeps the most likely tokens whose probabilities first add up to it
=====================  ========================================================================

`prompt_logprobs` adds that many likeliest tokens of every scored position (-1: the whole
vocabulary). Without it and without targets the prompt's own tokens are scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vllm.score.engine.request import InvalidScoreRequest as Invalid

# Below it, float32 logits divided by the temperature overflow.
MIN_TEMPERATURE = 1e-6

FIELDS = ("score_mode", "target_token_ids", "score_statistics", "score_temperature", "score_top_p")


@dataclass(frozen=True)
class ScoreFields:
    """The score fields of a request with ``score_mode: true``."""

    target_token_ids: Any = None
    score_statistics: list[str] | None = None
    score_temperature: float = 1.0
    score_top_p: float = 1.0


def score_fields(request: Any) -> ScoreFields | None:
    """The score fields of a `CompletionRequest`; None: it is an ordinary one.

    Raises:
        InvalidScoreRequest: a field has the wrong type, or stands without ``score_mode: true``.
    """
    extra = request.model_extra
    if not extra:
        return None
    given = {name: extra[name] for name in FIELDS if extra.get(name) is not None}
    mode = given.pop("score_mode", False)
    if not isinstance(mode, bool):
        raise Invalid(f"score_mode must be true or false, got {mode!r}.", parameter="score_mode")
    if not mode:
        if given:
            name = next(iter(given))
            raise Invalid(f"{name} needs score_mode=true in the same request.", parameter=name)
        return None
    names = given.get("score_statistics", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise Invalid(
            f"score_statistics must be a list of names, got {names!r}.",
            parameter="score_statistics",
        )
    temperature, top_p = given.get("score_temperature", 1.0), given.get("score_top_p", 1.0)
    if not (_is_number(temperature) and MIN_TEMPERATURE <= temperature < math.inf):
        raise Invalid(
            f"score_temperature must be a number from {MIN_TEMPERATURE} on, got {temperature!r}.",
            parameter="score_temperature",
        )
    if not (_is_number(top_p) and 0 < top_p <= 1):
        raise Invalid(
            f"score_top_p must be a number in (0, 1], got {top_p!r}.", parameter="score_top_p"
        )
    targets = given.get("target_token_ids")
    return ScoreFields(targets, names or None, float(temperature), float(top_p))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_request(request: Any, fields: ScoreFields) -> None:
    """Refuse stock fields that mean nothing beside ``score_mode: true``.

    Options of sampling are refused where the sampling parameters are made.

    Raises:
        InvalidScoreRequest: names the field and the remedy.
    """
    if request.use_beam_search:
        raise Invalid(
            "use_beam_search cannot be combined with score_mode=true: leave it out.",
            parameter="use_beam_search",
        )
    if request.truncate_prompt_tokens is not None and fields.target_token_ids is not None:
        raise Invalid(
            f"truncate_prompt_tokens={request.truncate_prompt_tokens} would shift "
            "target_token_ids: truncate the prompt and the targets yourself.",
            parameter="truncate_prompt_tokens",
        )
    if request.logprobs is None:
        return
    if not request.echo:
        raise Invalid(
            f"logprobs={request.logprobs} are those of generated tokens, and score_mode generates "
            "none: leave it out (the answer has scores), or set echo=true.",
            parameter="logprobs",
        )
    if fields.target_token_ids is not None:
        raise Invalid(
            f"echo=true with logprobs={request.logprobs} needs a score of every prompt token: "
            "leave out logprobs, or target_token_ids.",
            parameter="logprobs",
        )
    if alternatives(request) == -1:
        raise Invalid(
            "logprobs cannot list the whole vocabulary beside score_mode=true: leave out "
            "logprobs and set prompt_logprobs=-1.",
            parameter="logprobs",
        )


def alternatives(request: Any) -> int:
    """`prompt_logprobs` of the score request: as asked, else 0."""
    asked = request.prompt_logprobs
    if asked is None and request.echo:
        asked = request.logprobs
    return 0 if asked is None else int(asked)


def targets_by_prompt(request: Any, fields: ScoreFields, prompts: int) -> list[Any]:
    """The targets of each prompt, None where there are none.

    Raises:
        InvalidScoreRequest: a list of prompts has another number of target lists.
    """
    given = fields.target_token_ids
    if given is None:
        return [None] * prompts
    prompt = request.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [given]
    if not isinstance(given, list) or len(given) != prompts:
        count = f"{len(given)} entries" if isinstance(given, list) else repr(given)
        raise Invalid(
            f"target_token_ids must be a list with one entry for each of the {prompts} prompts, "
            f"got {count}.",
            parameter="target_token_ids",
        )
    return list(given)
