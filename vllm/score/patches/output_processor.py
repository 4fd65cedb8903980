"""The array of a finished score request becomes `scores` and the view in `prompt_logprobs`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.engine.output import ANY_ID, EveryId
from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Remember the plan with the request's state, and read it when the output is built."""

    def from_new_request(wrapped: Any, cls: Any, args: Any, kwargs: Any) -> Any:
        state = wrapped(*args, **kwargs)
        tokenizer, request = _tokenizer_and_request(*args, **kwargs)
        params = request.sampling_params
        if params is not None and params.score_mode:
            state.score_spec = params._score
            state.score_lease = params.__dict__.pop("score_lease")
            state.score_tokenizer = tokenizer
        elif tokenizer is not None and hasattr(params, ANY_ID):
            state.logprobs_processor.tokenizer = EveryId(tokenizer)
        return state

    def new_request_output(wrapped: Any, state: Any, args: Any, kwargs: Any) -> Any:
        output = wrapped(*args, **kwargs)
        spec = getattr(state, "score_spec", None)
        if spec is not None:
            from vllm.score.engine.output import FailedScores, attach_scores, decoder

            attach_scores(output, spec, decoder(state.score_tokenizer))
            if isinstance(output.scores, FailedScores) and output.scores.nan:
                state.score_lease.found_nan()
        return output

    wrapt.wrap_function_wrapper(module, "RequestState.from_new_request", from_new_request)
    wrapt.wrap_function_wrapper(module, "RequestState._new_request_output", new_request_output)


def _tokenizer_and_request(tokenizer: Any, request: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    return tokenizer, request


PATCH = Patch(
    target="vllm.v1.engine.output_processor",
    contract={
        "RequestState.from_new_request": ("cls", "tokenizer", "request"),
        "RequestState._new_request_output": ("self", "external_req_id", "outputs", "finished"),
    },
    apply=apply,
    roles=("front end",),
    why="Users read arrays, or what looks like stock prompt_logprobs; no dict is built unread.",
    how="The state remembers what admission made; the output gets the scores after the "
    "stock function built it, and is checked for shape, NaN and stray tokens. A token "
    "generated behind an echo has a text for every id of the model.",
    risk="An output path that bypasses _new_request_output returns the bare array.",
    upstream="Pull request: in LogprobsProcessor and RequestOutput.",
    remove_when="RequestOutput carries scores.",
)
