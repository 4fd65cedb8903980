"""The register of patches, which arming, the doctor, the documents and the tests read."""

from __future__ import annotations

from functools import partial

from vllm.score.patches import (
    async_llm,
    chat_completion_protocol,
    completion_protocol,
    completion_serving,
    engine_core,
    gpu_model_runner,
    input_processor,
    kv_cache_manager,
    llm_engine,
    logits_processor,
    lora_layers_logits_processor,
    output_processor,
    outputs,
    prompt_logprob,
    renderers_base,
    responses_protocol,
    sampling_params,
    scheduler,
)
from vllm.score.patches.causes import why_failed, why_not_armed
from vllm.score.patches.imports import settle, when_imported
from vllm.score.patches.patch import Application, Patch, Role

REGISTER: tuple[Patch, ...] = (
    sampling_params.PATCH,
    renderers_base.PATCH,
    input_processor.PATCH,
    outputs.PATCH,
    output_processor.PATCH,
    llm_engine.PATCH,
    async_llm.PATCH,
    engine_core.PATCH,
    kv_cache_manager.PATCH,
    scheduler.PATCH,
    gpu_model_runner.PATCH,
    prompt_logprob.PATCH,
    logits_processor.PATCH,
    lora_layers_logits_processor.PATCH,
    completion_protocol.PATCH,
    completion_serving.PATCH,
    chat_completion_protocol.PATCH,
    responses_protocol.PATCH,
)

_applications: dict[str, Application] = {}


def upstream_version() -> str:
    """The version of the vLLM beside us."""
    from vllm.version import __version__

    return str(__version__)


def arm() -> None:
    """Have every patch applied when its module is imported; a second call does nothing."""
    if _applications:
        return
    version = upstream_version()
    sampling_params.refuse_when(lambda: front_end_problem())
    _applications.update({patch.target: Application(patch) for patch in REGISTER})
    for target, application in _applications.items():
        when_imported(target, partial(application.run, version=version))


def armed() -> bool:
    """Whether this process was armed."""
    return bool(_applications)


def applications(role: Role | None = None) -> list[Application]:
    """The state of every patch (that `role` needs), read back now; empty when not armed."""
    wanted = [a for a in _applications.values() if role is None or role in a.patch.roles]
    for application in wanted:
        settle(application.patch.target)
        application.check()
    return wanted


def problem(role: Role) -> str | None:
    """Why this process cannot play `role` for score requests, in one sentence; else None.

    A module that nobody imported cannot answer a request, so only failures count.
    """
    if not armed():
        return f"score mode is off in the {role}: {why_not_armed()}."
    for application in applications(role):
        if application.state == "failed":
            target, reason = application.patch.target, application.reason
            return (
                f"score mode is off in the {role}: "
                f"{why_failed(target, reason, upstream_version())}."
            )
    return None


def front_end_problem() -> str | None:
    """`problem` of the front end."""
    return problem("front end")


def require_score_mode() -> None:
    """Asked before models are made, engines started and texts read.

    Raises:
        ScoreModeUnavailable: score mode is off in this process.
    """
    from vllm import SamplingParams  # noqa: F401 - has vLLM load its plugins
    from vllm.score.errors import ScoreModeUnavailable

    found = front_end_problem()
    if found is not None:
        raise ScoreModeUnavailable(found)
