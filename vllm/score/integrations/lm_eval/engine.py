"""The engine behind the model: vLLM's own defaults, but for what a CPU needs."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from vllm.score.engine.configuration import with_room_for_one_more
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm import LLM

logger = logging.getLogger("lm_eval.vllm_score")  # LMEVAL_LOG_LEVEL holds

# vLLM's blocks of 128 tokens on a CPU leave up to 127 tokens of a common context unshared.
CPU_BLOCK_SIZE = 32


def start_engine(options: dict[str, Any]) -> LLM:
    """A running `vllm.LLM` that reads as many tokens as `max_model_len` says.

    Args:
        options: of `vllm.LLM`; None means vLLM's default. `max_model_len` has the meaning of
            `max_length` of lm-eval's `hf` model, which predicts a token after as many: the engine
            is started with one more, where the model allows it.

    Raises:
        ScoreModeError: it cannot be started; see `vllm.score.launch.start`.
    """
    from vllm.platforms import current_platform
    from vllm.score.launch.start import start_llm

    settings = {name: value for name, value in options.items() if value is not None}
    if int(settings.get("data_parallel_size", 1)) > 1:
        raise ScoreModeError(
            f"data_parallel_size is {settings['data_parallel_size']}: one LLM drives one replica. "
            "Start `vllm serve MODEL --data-parallel-size N` and evaluate it with "
            "--model local-completions, or use tensor_parallel_size."
        )
    if current_platform.is_cpu():
        settings = {**_for_cpu(settings), **settings}
    return start_llm(settings, prepare=with_room_for_one_more)


def longest_input(llm: LLM, asked: int | None, *, given: bool) -> int:
    """Tokens that the model reads at most: `asked`, or all that the engine allows.

    vLLM never takes a prompt of max_model_len tokens, as one more is to be generated.

    Args:
        asked: by `max_length`.
        given: whether the engine was running before.

    Raises:
        ScoreModeError: a given engine cannot read as many tokens as are asked for.
    """
    engine = int(llm.llm_engine.model_config.max_model_len)
    if asked is None or asked < engine:
        return engine - 1 if asked is None else asked
    if given:
        raise ScoreModeError(
            f"max_length is {asked}, but the engine with max_model_len={engine} reads "
            f"{engine - 1} tokens at most: start it with LLM(max_model_len={asked + 1}), or give "
            f"max_length={engine - 1}."
        )
    logger.warning(
        "max_model_len is %d, and vLLM reads %d tokens of this model at most: longer texts are cut "
        "as lm-eval's hf model cuts them with max_length=%d.",
        asked,
        engine - 1,
        engine - 1,
    )
    return engine - 1


def _for_cpu(settings: dict[str, Any]) -> dict[str, Any]:
    """Defaults with which a model starts on a CPU without a variable or flag to set."""
    defaults: dict[str, Any] = {"block_size": CPU_BLOCK_SIZE, "enforce_eager": True}
    if "gpu_memory_utilization" not in settings and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        from vllm.score.cli.engine import cpu_cache_bytes

        defaults["kv_cache_memory_bytes"] = cpu_cache_bytes(
            settings["model"], _context_length(settings), low_memory=False, settings=settings
        )
    if int(settings.get("tensor_parallel_size", 1)) == 1:
        # An engine process of its own would compete for the cores.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        defaults["distributed_executor_backend"] = "uni"
    return defaults


def _context_length(settings: dict[str, Any]) -> int:
    """Tokens of the longest prompt, to size the KV cache by."""
    if settings.get("max_model_len"):
        return int(settings["max_model_len"])
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            settings["model"],
            trust_remote_code=bool(settings.get("trust_remote_code")),
            revision=settings.get("revision"),
        ).get_text_config()
    except (OSError, ValueError):
        return 0  # cpu_cache_bytes says what is wrong
    return int(getattr(config, "max_position_embeddings", None) or 0)


def load_tokenizer(llm: LLM, add_bos_token: bool | None) -> Any:
    """The engine's tokenizer by name, with another setting of BOS where one is asked for.

    Not the engine's own object: that one answers from a pool of copies, so that nothing that is
    set on it (a chat template) takes effect.
    """
    from vllm.tokenizers import get_tokenizer

    config = llm.llm_engine.model_config
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    return get_tokenizer(
        config.tokenizer,
        tokenizer_mode=config.tokenizer_mode,
        trust_remote_code=config.trust_remote_code,
        revision=config.tokenizer_revision,
        **options,
    )
