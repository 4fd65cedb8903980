"""In the front end: what `LLMEngine` and `AsyncLLM` see to before they admit a score request.

vllm.v1.engine.llm_engine
    Why: Fail closed across processes; and `LLM(model=...)` scores the whole vocabulary without
        max_logprobs, which protects servers from their clients. A function run in the workers may
        hook or change the model: scores must not rest on prefixes cached before.
    How: One status call before the first score request of an engine. After collective_rpc the next
        score request resets the prefix cache or, beside running requests, does not read it. After
        a NaN it has the KV cache emptied, or does not read it. Where an engine process died of
        importing an unguarded script, the error gets a note.
    Risk: Workers replaced later (elastic scaling) are not asked again.
    Upstream: Not needed in a merged fork, but for the limit.
    Deleted when: Score mode is part of vLLM.

vllm.v1.engine.async_llm
    Why: Fail closed across processes, as for LLMEngine.
    How: As for LLMEngine.
    Risk: Workers replaced later (elastic scaling) are not asked again.
    Upstream: Not needed in a merged fork.
    Deleted when: Score mode is part of vLLM.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any

from vllm.score.engine.configuration import check_configuration
from vllm.score.engine.request import NO_CLIENT_LIMIT
from vllm.score.errors import ScoreModeUnavailable
from vllm.score.patches.front_end import NAN_SEEN
from vllm.score.patches.patch import Patch
from vllm.score.patches.status import first_problem

LLM_ENGINE = Patch("vllm.v1.engine.llm_engine", ("front end",))
ASYNC_LLM = Patch("vllm.v1.engine.async_llm", ("front end",))

# On an engine: all its processes have said that they can score.
CHECKED = "score_mode_checked"
# On an engine: something was run in the workers since, a hook or a change of weights, and the
# prefix cache may be another model's.
TOUCHED = "score_mode_model_touched"


def ask_engine(engine: Any) -> list[dict[str, Any]]:
    """Status of every process behind an `LLMEngine`.

    Raises:
        ScoreModeUnavailable: the engine core does not know the question.
    """
    statuses: list[dict[str, Any]] = _at_once(_statuses(engine))
    return statuses


async def _statuses(engine: Any) -> Any:
    try:
        return await _ask(engine, "score_status")
    except Exception as error:
        raise ScoreModeUnavailable(
            f"score mode is not armed in the engine core or one of its workers: {error}; install "
            "the same vllm-score wherever they run, and set VLLM_PLUGINS there as here."
        ) from error


async def _ask(engine: Any, method: str) -> Any:
    """What a method that we added to the engine core says."""
    client = engine.engine_core
    core = getattr(client, "engine_core", None)  # the in-process client holds the core itself
    if core is not None:
        return getattr(core, method)()
    if hasattr(client, "call_utility"):
        return client.call_utility(method)
    return await client.call_utility_async(method)


def _at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing: an `LLMEngine` answers at once."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("an LLMEngine has to answer at once.")


async def _admitted(engine: Any, params: Any, unfinished: Callable[[], bool]) -> Any:
    """The parameters of a score request as they may be sent.

    Args:
        unfinished: whether the engine has requests.

    Raises:
        ScoreModeUnavailable: a process behind the engine cannot score.
        InvalidScoreRequest: its configuration cannot be scored.
    """
    if not getattr(engine, CHECKED, False):
        check_configuration(engine.vllm_config)
        _raise_if_refused(await _statuses(engine))
        setattr(engine, CHECKED, True)
    fresh = True
    for owner, flag, clear in (
        (engine.input_processor, NAN_SEEN, lambda: _ask(engine, "score_empty_cache")),
        (engine, TOUCHED, engine.reset_prefix_cache),
    ):
        if getattr(owner, flag, False):
            cleared = False if unfinished() else clear()
            if await cleared if isawaitable(cleared) else cleared:
                setattr(owner, flag, False)
            else:
                fresh = False
    return params if fresh else without_cache(params)


def _raise_if_refused(statuses: list[dict[str, Any]]) -> None:
    """Raise ScoreModeUnavailable when a process reports a problem; pass warnings on, once each."""
    problem = first_problem(statuses)
    if problem is not None:
        raise ScoreModeUnavailable(problem)
    for text in sorted({text for s in statuses for text in s.get("warnings", ())}):
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def without_cache(params: Any) -> Any:
    """A copy of sampling parameters whose request reads no cached prefix."""
    copied = params.clone()
    vars(copied).update(vars(params))  # the marks of a server's request, which a copy lacks
    copied.skip_reading_prefix_cache = True
    return copied


@contextmanager
def _touching(engine: Any) -> Iterator[None]:
    """Have the next score request check the engine again and forget its cache.

    Marked before and after: requests that are admitted meanwhile see either model.
    """
    marks = {TOUCHED: True, CHECKED: False}
    vars(engine).update(marks)
    try:
        yield
    finally:
        vars(engine).update(marks)


@LLM_ENGINE.wrap("LLMEngine.__init__")
def init(stock: Any, self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """No limit of a client; a note on a start that failed."""
    try:
        stock(vllm_config, *args, **kwargs)
    except RuntimeError as error:
        from vllm.score.launch.reasons import unguarded_script_note

        if note := unguarded_script_note(error):
            error.add_note(note)
        raise
    setattr(self.input_processor, NO_CLIENT_LIMIT, True)


@LLM_ENGINE.wrap("LLMEngine.add_request")
def add_request(
    stock: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Admit a score request, or refuse it."""
    if getattr(params, "score_mode", False):
        params = _at_once(_admitted(self, params, self.has_unfinished_requests))
    return stock(request_id, prompt, params, *args, **kwargs)


@ASYNC_LLM.wrap("AsyncLLM.add_request")
async def add_request_async(
    stock: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """The same, for an engine that is waited for."""
    if getattr(params, "score_mode", False):
        unfinished = self.output_processor.has_unfinished_requests
        params = await _admitted(self, params, unfinished)
    return await stock(request_id, prompt, params, *args, **kwargs)


@LLM_ENGINE.wrap("LLMEngine.collective_rpc")
def collective_rpc(stock: Any, self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Note that the model may have changed."""
    with _touching(self):
        return stock(method, *args, **kwargs)


@ASYNC_LLM.wrap("AsyncLLM.collective_rpc")
async def collective_rpc_async(
    stock: Any, self: Any, method: Any, *args: Any, **kwargs: Any
) -> Any:
    """The same."""
    with _touching(self):
        return await stock(method, *args, **kwargs)
