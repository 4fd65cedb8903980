"""From the body of a request to sampling parameters: what is scored, and what is refused.

Beside the stock fields the body of a completion request may hold:

=====================  ========================================================================
``score_mode``         true: score the prompt, generate nothing (``max_tokens`` is ignored)
``target_token_ids``   for one prompt: m token ids, or m lists of k candidates, for its last m
                       positions; for a list of prompts: a list with that (or null) for each
``score_statistics``   names, see `vllm.score.ops.statistics`
``score_temperature``  divides the logits
``score_top_p``        keeps the most likely tokens whose probabilities first add up to it
=====================  ========================================================================

`prompt_logprobs` adds that many likeliest tokens of every scored position (-1: the whole
vocabulary). Without it and without targets the prompt's own tokens are scored.

Sampling parameters that are to be scored carry a mark, an attribute that the completion server's
engine client (`vllm.score.server.client`) reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from vllm.score.armed import front_end_problem
from vllm.score.checks import Flag, Fraction, Number
from vllm.score.engine.configuration import check_configuration
from vllm.score.engine.request import (
    NO_VIEW,
    TARGETS,
    ModelFacts,
    admit_tokenised,
    check_field,
    check_prompt,
    check_truncation,
    refusing,
)
from vllm.score.engine.request import InvalidScoreRequest as Invalid
from vllm.score.errors import ScoreModeError, ScoreModeUnavailable

MARK = "score_server"
FIELDS: dict[str, Any] = {
    "score_mode": Flag,
    TARGETS: Any,
    "score_statistics": list[str],
    # Below it, float32 logits divided by the temperature overflow.
    "score_temperature": Annotated[Number, Field(ge=1e-6)],
    "score_top_p": Fraction,
}


@dataclass(frozen=True)
class ScoreFields:
    """The score fields of a request with ``score_mode: true``."""

    target_token_ids: Any = None
    score_statistics: list[str] | None = None
    score_temperature: float = 1.0
    score_top_p: float = 1.0


@dataclass(frozen=True)
class Echo:
    """Mark of an ordinary request for the log-probabilities of its prompt.

    Attributes:
        top: alternatives per token.
        generate: a token is to be generated as well.
    """

    top: int
    generate: bool


@dataclass(frozen=True)
class Explicit:
    """Mark of a request with ``score_mode: true``.

    Attributes:
        stock_form: the stock fields `prompt_logprobs`, or `echo` with `logprobs`, were asked for.
        targets: the request names what is scored, so not every prompt token has a score.
    """

    stock_form: bool
    targets: bool


def score_fields(request: Any) -> ScoreFields | None:
    """The score fields of a `CompletionRequest`; None: it is an ordinary one.

    Raises:
        InvalidScoreRequest: a field has the wrong type, or stands without ``score_mode: true``.
    """
    extra = request.model_extra or {}
    given = {
        name: check_field(name, extra[name], kind)
        for name, kind in FIELDS.items()
        if extra.get(name) is not None
    }
    if given.pop("score_mode", False):
        return ScoreFields(**given)
    if given:
        name = next(iter(given))
        raise Invalid(f"{name} needs score_mode=true in the same request.", parameter=name)
    return None


def prepare(request: Any, fields: ScoreFields) -> None:
    """Check the body, and give it the `max_tokens` of a request that generates nothing.

    Options of sampling are refused where the sampling parameters are made.

    Raises:
        InvalidScoreRequest: answered with status 400; also where score mode is off.
    """
    problem = front_end_problem()
    if problem is not None:
        raise Invalid(problem, parameter="score_mode")
    targets, asked = fields.target_token_ids is not None, request.logprobs
    if targets:
        check_truncation(request.truncate_prompt_tokens)
    if request.prompt_embeds is not None:
        raise Invalid(
            "prompt_embeds cannot be combined with score_mode=true: this endpoint answers about "
            "token ids; score embeddings with LLM or AsyncLLM.",
            parameter="prompt_embeds",
        )
    if request.use_beam_search:
        raise Invalid(
            "use_beam_search cannot be combined with score_mode=true: leave it out.",
            parameter="use_beam_search",
        )
    if asked is not None:
        _check_logprobs(request, asked, targets)
    request.max_tokens = 0


@refusing("logprobs")
def _check_logprobs(request: Any, asked: int, targets: bool) -> None:
    """Refuse `logprobs` where there is nothing to fill them with."""
    if not request.echo:
        raise ScoreModeError(
            f"logprobs={asked} are those of generated tokens, and score_mode generates none: leave "
            "it out (the answer has scores), or set echo=true."
        )
    if targets:
        raise ScoreModeError(
            f"echo=true with logprobs={asked} needs a score of every prompt token: leave out "
            "logprobs, or target_token_ids."
        )
    if _alternatives(request) == -1:
        raise ScoreModeError(
            "logprobs cannot list the whole vocabulary beside score_mode=true: leave out logprobs "
            "and set prompt_logprobs=-1."
        )


def add_targets(serving: Any, request: Any, fields: ScoreFields, engine_inputs: list[Any]) -> None:
    """Give each prompt its targets.

    Checked as the engine will check them: once a stream has begun, its status is 200.

    Raises:
        InvalidScoreRequest: naming the field.
    """
    check_configuration(serving.engine_client.vllm_config)
    targets = _targets_by_prompt(request.prompt, fields.target_token_ids, len(engine_inputs))
    params = request.to_sampling_params(0, serving.default_sampling_params)
    facts = ModelFacts.of(serving.engine_client.input_processor)
    tokenizer = serving.engine_client.renderer.tokenizer
    for engine_input, target in zip(engine_inputs, targets, strict=True):
        check_prompt(engine_input, resumable=False)
        if target is not None:
            engine_input[TARGETS] = target
        admit_tokenised(engine_input, params, facts, tokenizer)


@refusing(TARGETS)
def _targets_by_prompt(prompt: Any, given: Any, count: int) -> list[Any]:
    """The targets of each of the prompts, None where there are none."""
    if given is None:
        return [None] * count
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [given]
    if not isinstance(given, list) or len(given) != count:
        found = f"{len(given)} entries" if isinstance(given, list) else repr(given)
        raise ScoreModeError(
            f"{TARGETS} must be a list with one entry for each of the {count} prompts, got {found}."
        )
    return given


def _alternatives(request: Any) -> int | None:
    """How many alternatives per token the stock fields ask for; None: for no stock form."""
    asked: int | None = request.prompt_logprobs
    return request.logprobs if asked is None and request.echo else asked


def score_params(request: Any, fields: ScoreFields, stock: Any) -> Any:
    """Make the stock parameters of a request those of a score request.

    Raises:
        InvalidScoreRequest: an option cannot be combined with `score_mode`, or score mode is off.
    """
    targets = fields.target_token_ids is not None
    if targets and request.max_tokens != 0:  # which the completion endpoint sets
        raise Invalid("target_token_ids is only served by /v1/completions.", parameter=TARGETS)
    top = _alternatives(request)
    stock.score_mode = True
    stock.score_statistics = fields.score_statistics or None
    stock.score_temperature = fields.score_temperature
    stock.score_top_p = fields.score_top_p
    stock.logprobs = None
    stock.prompt_logprobs = top or 0
    # Not those of the model's generation config, which no client asked for.
    stock.stop_token_ids = list(request.stop_token_ids or [])
    stock.skip_reading_prefix_cache = None
    try:
        stock._verify_args()
    except ScoreModeUnavailable as error:
        raise Invalid(str(error), parameter="score_mode") from error
    stock_form = top is not None and top != -1  # the whole vocabulary
    setattr(stock, MARK, Explicit(stock_form, targets))
    if not stock_form:
        setattr(stock, NO_VIEW, True)
    return stock


def mark_echo(request: Any, params: Any) -> None:
    """Mark the parameters of a stock request that only wants its prompt scored.

    That is `echo` with `logprobs` and `max_tokens` 0, or 1, as clients send that know servers which
    refuse 0. Anything else stays with stock vLLM: longer generations, several choices, the whole
    vocabulary, and what constrains the tokens.
    """
    wanted = (
        request.echo
        and request.logprobs is not None
        and request.logprobs >= 0
        and request.prompt_logprobs is None
        and request.max_tokens in (0, 1)
        and request.n == 1
    )
    constrained = (
        params.logprob_token_ids,
        params.structured_outputs,
        params.logit_bias,
        params.allowed_token_ids,
        params.bad_words,
        request.kv_transfer_params,
        request.ec_transfer_params,
    )
    if wanted and not any(constrained):
        setattr(params, MARK, Echo(top=request.logprobs, generate=request.max_tokens == 1))


def refuse_score_fields(request: Any, left: int, limits: tuple[str, ...]) -> None:
    """Refuse a request of an endpoint that does not score.

    Args:
        left: tokens that the endpoint lets it generate.
        limits: the fields that limit the generated tokens.

    Raises:
        InvalidScoreRequest: its body has a score field, or no token is left.
    """
    extra = request.model_extra or {}
    for name in FIELDS:
        if extra.get(name) is not None and extra[name] is not False:
            raise Invalid(
                f"{name} is only served by /v1/completions: send the rendered prompt there.",
                parameter=name,
            )
    asked = next((n for n in (vars(request).get(f) for f in limits) if n is not None), None)
    check_room(left, asked)


def check_room(left: int, asked: int | None, otherwise: str = "") -> None:
    """Refuse a request for tokens whose prompt fills the model's context.

    Args:
        left: what the endpoint made of `asked` and of the room behind the prompt.
        asked: `max_tokens` in the body.
        otherwise: another remedy.

    Raises:
        InvalidScoreRequest: 0 is left of a number above 0.
    """
    if left == 0 and asked != 0:
        wanted = "a token" if asked is None else f"max_tokens={asked}"
        raise Invalid(
            f"the prompt is as long as max_model_len and leaves no room for {wanted}: shorten it, "
            f"or start the server with a larger --max-model-len{otherwise}.",
            parameter="max_tokens",
        )
