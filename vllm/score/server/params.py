"""From a completion request to sampling parameters: which are scored, and how they are marked.

The mark is an attribute of the sampling parameters, read by the completion server's engine client
(`vllm.score.server.client`); nothing else looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.score.engine.request import InvalidScoreRequest
from vllm.score.server.body import ScoreFields, alternatives

MARK = "score_server"


@dataclass(frozen=True)
class Echo:
    """An ordinary request for the log-probabilities of its prompt.

    Attributes:
        top: alternatives a token.
        generate: a token is to be generated as well.
    """

    top: int
    generate: bool


@dataclass(frozen=True)
class Explicit:
    """A request with ``score_mode: true``.

    Attributes:
        stock_form: the stock fields `prompt_logprobs`, or `echo` with `logprobs`, were asked for.
        targets: the request names what is scored, so not every prompt token has a score.
    """

    stock_form: bool
    targets: bool


def echo_mark(request: Any, params: Any) -> Echo | None:
    """The mark of a stock request that only wants its prompt scored; None: leave it alone.

    `echo` with `logprobs` and `max_tokens` 0, or 1, as clients send that know servers which refuse
    0. Anything else stays with stock vLLM: longer generations, several choices, the whole
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
    if not wanted or any(constrained):
        return None
    return Echo(top=request.logprobs, generate=request.max_tokens == 1)


def score_params(request: Any, fields: ScoreFields, stock: Any) -> Any:
    """Make the stock parameters of a request those of a score request.

    Raises:
        InvalidScoreRequest: an option cannot be combined with `score_mode`, or score mode is off.
    """
    from vllm.score.errors import ScoreModeUnavailable

    targets = fields.target_token_ids is not None
    if targets and request.max_tokens != 0:  # which the completion endpoint sets
        raise InvalidScoreRequest(
            "target_token_ids is only served by /v1/completions.", parameter="target_token_ids"
        )
    top = alternatives(request)
    asked = request.logprobs if request.echo else None
    stock_form = (request.prompt_logprobs is not None or asked is not None) and top != -1
    statistics = list(fields.score_statistics or [])
    if stock_form and not targets and "rank" not in statistics:
        statistics.append("rank")  # a part of the stock form
    stock.score_mode = True
    stock.score_statistics = statistics or None
    stock.score_temperature = fields.score_temperature
    stock.score_top_p = fields.score_top_p
    stock.logprobs = None
    stock.prompt_logprobs = top
    # Not those of the model's generation config, which no client asked for.
    stock.stop_token_ids = list(request.stop_token_ids or [])
    stock.skip_reading_prefix_cache = None
    try:
        stock._verify_args()
    except ScoreModeUnavailable as error:
        raise InvalidScoreRequest(str(error), parameter="score_mode") from error
    setattr(stock, MARK, Explicit(stock_form, targets))
    return stock
