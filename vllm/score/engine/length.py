"""An engine whose score requests read as many tokens as the model can.

vLLM refuses a prompt of max_model_len tokens, as one more is to be generated. A score request
generates none, and its last token is predicted but not read: to read N tokens, and predict the one
after them, it needs an engine with max_model_len = N + 1. No position beyond N is ever computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

# Llama 4 scales its attention in vLLM where max_model_len is above this, unless its generation
# config says whether to.
_LLAMA4_PLAIN_ATTENTION = 32768


def with_room_for_one_more(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `vllm.LLM` with a max_model_len larger by one.

    They are returned as they are where the larger number would change what the model computes, or
    vLLM cannot be told to accept it.

    Args:
        settings: of `vllm.LLM`. Without max_model_len it is as long as vLLM makes it by itself.

    Raises:
        Exception: what vLLM raises for settings that it refuses.
    """
    config = model_config(settings)
    length = int(config.max_model_len)
    larger = {**settings, "max_model_len": length + 1}
    if _changes_the_model(config, length) or _breaks_the_batches(settings, length):
        return dict(settings)
    try:
        config.get_and_verify_max_len(length + 1)
    except ValueError:
        # The model's own limit. vLLM goes beyond it where the configuration names another one.
        overrides = settings.get("hf_overrides") or {}
        if config.hf_text_config is not config.hf_config or not isinstance(overrides, Mapping):
            return dict(settings)
        larger["hf_overrides"] = {**overrides, "model_max_length": length + 1}
    return larger


def model_config(settings: Mapping[str, Any]) -> Any:
    """vLLM's `ModelConfig` of settings of `vllm.LLM`.

    Raises:
        Exception: what vLLM raises for settings that it refuses.
    """
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    names = {f.name for f in fields(EngineArgs)} & {f.name for f in fields(ModelConfig)}
    given = {name: value for name, value in settings.items() if name in names}
    return EngineArgs(**given).create_model_config()


def _changes_the_model(config: Any, length: int) -> bool:
    """Whether vLLM builds another model for max_model_len = length + 1 than for length."""
    from vllm.transformers_utils.config import iter_rope_parameters

    text = config.hf_text_config
    if "llama4" in text.model_type and length == _LLAMA4_PLAIN_ATTENTION:
        return True
    # LongRoPE has one set of factors up to this length, and another beyond it.
    originals = [getattr(text, "original_max_position_embeddings", None)]
    rope = list(iter_rope_parameters(text))
    originals += [parameters.get("original_max_position_embeddings") for parameters in rope]
    longrope = any(parameters.get("rope_type") == "longrope" for parameters in rope)
    return longrope and length in originals


def _breaks_the_batches(settings: Mapping[str, Any], length: int) -> bool:
    """Whether the batches hold max_model_len tokens, which must be a whole prompt, and no more."""
    batch = settings.get("max_num_batched_tokens")
    whole = settings.get("enable_chunked_prefill") is False
    return whole and batch is not None and int(batch) <= length
