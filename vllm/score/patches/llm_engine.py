"""`LLMEngine`: ask the engine's processes before the first score request; no client limit; no
cached prefixes of a model that was changed since.
"""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.input_processor import NAN_SEEN, NO_CLIENT_LIMIT
from vllm.score.patches.patch import Patch

CHECKED = "score_mode_checked"
# Something was run in the workers: a hook, a change of weights. The cache may be another model's.
TOUCHED = "score_mode_model_touched"


def ask_engine(engine: Any) -> list[dict[str, Any]]:
    """Status of every process behind an `LLMEngine`.

    Raises:
        ScoreModeUnavailable: the engine core does not know the question.
    """
    try:
        found: list[dict[str, Any]] = ask(engine, "score_status")
    except Exception as error:
        raise not_patched(error) from error
    return found


def ask(engine: Any, method: str) -> Any:
    """What a method that we added to the engine core of an `LLMEngine` says."""
    client = engine.engine_core
    core = getattr(client, "engine_core", None)  # the in-process client holds the core itself
    return client.call_utility(method) if core is None else getattr(core, method)()


def not_patched(error: Exception) -> Exception:
    """The error for an engine core that cannot answer."""
    from vllm.score.errors import ScoreModeUnavailable

    return ScoreModeUnavailable(
        f"score mode is not armed in the engine core or one of its workers: {error}; install the "
        "same vllm-score wherever they run, and set VLLM_PLUGINS there as here."
    )


def raise_if_refused(statuses: list[dict[str, Any]]) -> None:
    """Raise ScoreModeUnavailable when a process reports a problem; pass warnings on, once each."""
    from vllm.score.errors import ScoreModeUnavailable
    from vllm.score.patches.status import first_problem

    problem = first_problem(statuses)
    if problem is not None:
        raise ScoreModeUnavailable(problem)
    for text in sorted({text for s in statuses for text in s.get("warnings", ())}):
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def wants_scores(args: Any, kwargs: Any) -> bool:
    """Whether the arguments of `add_request` hold a score request."""
    params = kwargs.get("params", args[2] if len(args) > 2 else None)
    return bool(getattr(params, "score_mode", False))


def touched(engine: Any) -> None:
    """Have the next score request check the engine again and forget its cache."""
    setattr(engine, TOUCHED, True)
    setattr(engine, CHECKED, False)


def without_cache(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of `add_request` for a request that reads no cached prefix."""
    given = kwargs["params"] if "params" in kwargs else args[2]
    params = given.clone()
    vars(params).update(vars(given))  # the marks of a server's request, which a copy lacks
    params.skip_reading_prefix_cache = True
    if "params" in kwargs:
        return args, {**kwargs, "params": params}
    return (*args[:2], params, *args[3:]), kwargs


def apply(module: ModuleType) -> None:
    """Wrap construction, admission and the calls into the workers."""

    def init(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> None:
        try:
            wrapped(*args, **kwargs)
        except RuntimeError as error:
            from vllm.score.launch.guard import unguarded_script_note

            if note := unguarded_script_note(error):
                error.add_note(note)
            raise
        setattr(engine.input_processor, NO_CLIENT_LIMIT, True)

    def add_request(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
        if wants_scores(args, kwargs) and not getattr(engine, CHECKED, False):
            from vllm.score.engine.support import check_configuration

            check_configuration(engine.vllm_config)
            raise_if_refused(ask_engine(engine))
            setattr(engine, CHECKED, True)
        if getattr(engine.input_processor, NAN_SEEN, False) and wants_scores(args, kwargs):
            if not engine.has_unfinished_requests() and ask(engine, "score_empty_cache"):
                setattr(engine.input_processor, NAN_SEEN, False)
            else:
                args, kwargs = without_cache(args, kwargs)
        if getattr(engine, TOUCHED, False) and wants_scores(args, kwargs):
            if not engine.has_unfinished_requests() and engine.reset_prefix_cache():
                setattr(engine, TOUCHED, False)
            else:
                args, kwargs = without_cache(args, kwargs)
        return wrapped(*args, **kwargs)

    def collective_rpc(wrapped: Any, engine: Any, args: Any, kwargs: Any) -> Any:
        # Before and after: requests that are admitted meanwhile see either model.
        touched(engine)
        try:
            return wrapped(*args, **kwargs)
        finally:
            touched(engine)

    wrapt.wrap_function_wrapper(module, "LLMEngine.__init__", init)
    wrapt.wrap_function_wrapper(module, "LLMEngine.add_request", add_request)
    wrapt.wrap_function_wrapper(module, "LLMEngine.collective_rpc", collective_rpc)


PATCH = Patch(
    target="vllm.v1.engine.llm_engine",
    contract={
        "LLMEngine.__init__": ("self", "vllm_config"),
        "LLMEngine.add_request": ("self", "request_id", "prompt", "params"),
        "LLMEngine.collective_rpc": ("self", "method"),
    },
    apply=apply,
    roles=("front end",),
    why="Fail closed across processes; and `LLM(model=...)` scores the whole vocabulary without "
    "max_logprobs, which protects servers from their clients. A function run in the workers may "
    "hook or change the model: scores must not rest on prefixes cached before.",
    how="One status call before the first score request of an engine. After collective_rpc the "
    "next score request resets the prefix cache or, beside running requests, does not read it. "
    "After a NaN it has the KV cache emptied, or does not read it. Where an engine process died of "
    "importing an unguarded script, the error gets a note.",
    risk="Workers replaced later (elastic scaling) are not asked again.",
    upstream="Not needed in a merged fork, but for the limit.",
    remove_when="Score mode is part of vLLM.",
)
