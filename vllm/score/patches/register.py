"""The register of patches, which arming, the doctor, the documents and the tests read."""

from __future__ import annotations

from functools import partial

from vllm.score.armed import APPLICATIONS, upstream_version
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
from vllm.score.patches.imports import when_imported
from vllm.score.patches.patch import Application, Patch

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


def arm() -> None:
    """Have every patch applied when its module is imported; a second call does nothing."""
    if APPLICATIONS:
        return
    version = upstream_version()
    APPLICATIONS.extend(map(Application, REGISTER))
    for application in APPLICATIONS:
        when_imported(application.patch.target, partial(application.run, version=version))
