"""Endpoints that do not score."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.server.body import FIELDS


def refuse_score_fields(module: ModuleType, cls: str) -> None:
    """Have requests of class `cls` raise InvalidScoreRequest for a score field in their body."""

    def to_sampling_params(wrapped: Any, request: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.engine.invalid import InvalidScoreRequest

        extra = request.model_extra or {}
        for name in FIELDS:
            if extra.get(name) is not None and extra[name] is not False:
                raise InvalidScoreRequest(
                    f"{name} is only served by /v1/completions: send the rendered prompt there.",
                    parameter=name,
                )
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, f"{cls}.to_sampling_params", to_sampling_params)
