"""Endpoints that do not score."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.server.body import FIELDS


def check_room(asked: int | None, otherwise: str, args: Any, kwargs: Any) -> None:
    """Refuse a request for tokens whose prompt fills the model's context.

    Args:
        asked: `max_tokens` in the body.
        otherwise: another remedy, or "".
        args, kwargs: of `to_sampling_params`, which begin with what the endpoint made of it.

    Raises:
        InvalidScoreRequest: 0 is left of a number above 0.
    """
    from vllm.score.engine.request import InvalidScoreRequest

    left = args[0] if args else kwargs.get("max_tokens", kwargs.get("default_max_tokens"))
    if left == 0 and asked != 0:
        wanted = "a token" if asked is None else f"max_tokens={asked}"
        raise InvalidScoreRequest(
            f"the prompt is as long as max_model_len and leaves no room for {wanted}: shorten it, "
            f"or start the server with a larger --max-model-len{otherwise}.",
            parameter="max_tokens",
        )


def refuse_score_fields(module: ModuleType, cls: str, limits: tuple[str, ...]) -> None:
    """Have requests of class `cls` raise InvalidScoreRequest for a score field in their body.

    Args:
        limits: the fields that limit the generated tokens.
    """

    def to_sampling_params(wrapped: Any, request: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.engine.request import InvalidScoreRequest

        extra = request.model_extra or {}
        for name in FIELDS:
            if extra.get(name) is not None and extra[name] is not False:
                raise InvalidScoreRequest(
                    f"{name} is only served by /v1/completions: send the rendered prompt there.",
                    parameter=name,
                )
        asked = next((n for n in (vars(request).get(f) for f in limits) if n is not None), None)
        check_room(asked, "", args, kwargs)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, f"{cls}.to_sampling_params", to_sampling_params)
