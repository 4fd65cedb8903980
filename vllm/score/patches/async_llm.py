"""`AsyncLLM`: ask the engine's processes before the first score request; no cached prefixes of a
model that was changed since.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.input_processor import NAN_SEEN
from vllm.score.patches.llm_engine import (
    CHECKED,
    TOUCHED,
    not_patched,
    raise_if_refused,
    touched,
    wants_scores,
    without_cache,
)
from vllm.score.patches.patch import Patch


async def ask_engine(engine: Any) -> list[dict[str, Any]]:
    """Status of every process behind an `AsyncLLM`.

    Raises:
        ScoreModeUnavailable: the engine core does not know the question.
    """
    try:
        return await engine.engine_core.call_utility_async("score_status")
    except Exception as error:
        raise not_patched(error) from error


def apply(module: ModuleType) -> None:
    """Wrap admission and the calls into the workers."""

    async def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
        if wants_scores(args, kwargs) and not getattr(engine, CHECKED, False):
            from vllm.score.engine.configuration import check_configuration

            check_configuration(engine.vllm_config)
            raise_if_refused(await ask_engine(engine))
            setattr(engine, CHECKED, True)
        idle = not engine.output_processor.has_unfinished_requests()
        if getattr(engine.input_processor, NAN_SEEN, False) and wants_scores(args, kwargs):
            if idle and await engine.engine_core.call_utility_async("score_empty_cache"):
                setattr(engine.input_processor, NAN_SEEN, False)
            else:
                args, kwargs = without_cache(args, kwargs)
        if getattr(engine, TOUCHED, False) and wants_scores(args, kwargs):
            if idle and await engine.reset_prefix_cache():
                setattr(engine, TOUCHED, False)
            else:
                args, kwargs = without_cache(args, kwargs)
        return await wrapped(*args, **kwargs)

    async def collective_rpc(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
        # Before and after: requests that are admitted meanwhile see either model.
        touched(engine)
        try:
            return await wrapped(*args, **kwargs)
        finally:
            touched(engine)

    wrapt.wrap_function_wrapper(module, "AsyncLLM.add_request", add_request)
    wrapt.wrap_function_wrapper(module, "AsyncLLM.collective_rpc", collective_rpc)


PATCH = Patch(
    target="vllm.v1.engine.async_llm",
    contract={
        "AsyncLLM.add_request": ("self", "request_id", "prompt", "params"),
        "AsyncLLM.collective_rpc": ("self", "method"),
    },
    apply=apply,
    roles=("front end",),
    why="Fail closed across processes, as for LLMEngine.",
    how="As for LLMEngine.",
    risk="Workers replaced later (elastic scaling) are not asked again.",
    upstream="Not needed in a merged fork.",
    remove_when="Score mode is part of vLLM.",
)
