"""`/v1/completions`: requests for the log-probabilities of a prompt become score requests."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch

ECHO_ALONE = (
    "; for the log-probabilities of the prompt alone send max_tokens=0 with echo=true and logprobs"
)


def to_sampling_params(wrapped: Any, request: Any, args: Any, kwargs: Any) -> Any:
    """Wrapper of `CompletionRequest.to_sampling_params`."""
    from vllm.score.server.body import score_fields
    from vllm.score.server.elsewhere import check_room
    from vllm.score.server.params import MARK, echo_mark, score_params

    fields = score_fields(request)
    if fields is not None:
        return score_params(request, fields, wrapped(*_one_token(*args, **kwargs)))
    check_room(request.max_tokens, ECHO_ALONE, args, kwargs)
    params = wrapped(*args, **kwargs)
    mark = echo_mark(request, params)
    if mark is not None:
        setattr(params, MARK, mark)
    return params


def _one_token(max_tokens: int, default_sampling_params: Any = None) -> tuple[int, Any]:
    """The arguments, with the one token that the stock checks want."""
    return 1, default_sampling_params


def apply(module: ModuleType) -> None:
    """Wrap the one place where the request's fields become sampling parameters."""
    wrapt.wrap_function_wrapper(module, "CompletionRequest.to_sampling_params", to_sampling_params)


PATCH = Patch(
    target="vllm.entrypoints.openai.completion.protocol",
    contract={
        "CompletionRequest.to_sampling_params": (
            "self",
            "max_tokens",
            "default_sampling_params",
        ),
    },
    apply=apply,
    roles=("front end",),
    why="Clients ask for the log-probabilities of a prompt with echo, logprobs and max_tokens 0 "
    "or 1, and for scores with score_mode.",
    how="The stock function makes the parameters; a mark on them says what the completion server "
    "is to do. Parameters of other requests are returned as they are.",
    risk="A new stock field that changes what echo returns would not be seen; requests with "
    "anything but plain echo and logprobs are left alone for that reason.",
    upstream="Pull request: score_mode and target_token_ids in CompletionRequest.",
    remove_when="CompletionRequest has the fields.",
)
