"""A score request finishes with its prompt; the token that was sampled for it is dropped."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Wrap the place where new tokens are appended; AsyncScheduler calls it through super()."""
    finished = module.RequestStatus.FINISHED_LENGTH_CAPPED

    def update(wrapped: Any, scheduler: Any, args: Any, kwargs: Any) -> Any:
        request = kwargs.get("request", args[0] if args else None)
        params = request.sampling_params
        if params is None or not params.score_mode:
            return wrapped(*args, **kwargs)
        # The sampled id is only the tick that the prompt is complete.
        request.status = finished
        request.num_output_placeholders = 0
        return [], True

    wrapt.wrap_function_wrapper(module, "Scheduler._update_request_with_output", update)


PATCH = Patch(
    target="vllm.v1.core.sched.scheduler",
    contract={"Scheduler._update_request_with_output": ("self", "request", "new_token_ids")},
    apply=apply,
    roles=("engine core",),
    why="No token may be kept or returned.",
    how="The request is marked finished by length, with no new tokens; everything after that is "
    "the stock path.",
    risk="None known: the asynchronous scheduler adds to what this returns.",
    upstream="Pull request: a branch for max_tokens == 0.",
    remove_when="The scheduler finishes requests with max_tokens == 0.",
)
