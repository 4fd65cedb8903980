"""`LLMEngine`: ask the engine's processes before the first score request; no client limit."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.input_processor import NO_CLIENT_LIMIT
from vllm.score.patches.patch import Patch

CHECKED = "score_mode_checked"


def ask_engine(engine: Any) -> list[dict[str, Any]]:
    """Status of every process behind an `LLMEngine`.

    Raises:
        ScoreModeUnavailable: the engine core does not know the question.
    """
    client = engine.engine_core
    core = getattr(client, "engine_core", None)  # the in-process client holds the core itself
    try:
        return core.score_status() if core is not None else client.call_utility("score_status")
    except Exception as error:
        raise not_patched(error) from error


def not_patched(error: Exception) -> Exception:
    """The error for an engine core that cannot answer."""
    from vllm.score.errors import ScoreModeUnavailable

    return ScoreModeUnavailable(
        "score mode is not armed in the engine core or one of its workers (vllm-score must be "
        f"installed wherever they run): {error}; run `vllm-score doctor`."
    )


def raise_if_refused(statuses: list[dict[str, Any]]) -> None:
    """Raise ScoreModeUnavailable when a process reports a problem; pass warnings on, once each."""
    from vllm.score.engine.status import first_problem
    from vllm.score.errors import ScoreModeUnavailable

    problem = first_problem(statuses)
    if problem is not None:
        raise ScoreModeUnavailable(problem)
    for text in sorted({s["warning"] for s in statuses if s.get("warning")}):
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def wants_scores(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of `add_request` hold a score request."""
    params = kwargs.get("params", args[2] if len(args) > 2 else None)
    return bool(getattr(params, "score_mode", False))


def apply(module: ModuleType) -> None:
    """Wrap construction and admission."""

    def init(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        setattr(engine.input_processor, NO_CLIENT_LIMIT, True)

    def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
        if wants_scores(args, kwargs) and not getattr(engine, CHECKED, False):
            from vllm.score.engine.support import check_configuration

            check_configuration(engine.vllm_config)
            raise_if_refused(ask_engine(engine))
            setattr(engine, CHECKED, True)
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "LLMEngine.__init__", init)
    wrapt.wrap_function_wrapper(module, "LLMEngine.add_request", add_request)


PATCH = Patch(
    target="vllm.v1.engine.llm_engine",
    contract={
        "LLMEngine.__init__": ("self", "vllm_config"),
        "LLMEngine.add_request": ("self", "request_id", "prompt", "params"),
    },
    apply=apply,
    roles=("front end",),
    why="Fail closed across processes; and `LLM(model=...)` scores the whole vocabulary without "
    "max_logprobs, which protects servers from their clients.",
    how="One status call before the first score request of an engine.",
    risk="Workers replaced later (elastic scaling) are not asked again.",
    upstream="Not needed in a merged fork, but for the limit.",
    remove_when="Score mode is part of vLLM.",
)
