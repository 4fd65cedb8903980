"""Start an `LLM` that fits a scoring run, with no flag or environment variable to set."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm.score.engine.configuration import with_room_for_one_more
from vllm.score.launch.start import DEBUG, start_llm

if TYPE_CHECKING:
    from vllm import LLM

CPU_WINDOWS_IN_CACHE = 16
CPU_CACHE_BYTES = (256 << 20, 16 << 30)
# How commands spell arguments of `vllm.LLM`; those of lists and numbers that they have.
OPTIONS = {
    name: "--" + name.replace("_", "-")
    for name in (
        "dtype",
        "gpu_memory_utilization",
        "quantization",
        "tensor_parallel_size",
        "trust_remote_code",
    )
} | {"max_model_len": "the texts or windows"}


def open_llm(
    model: str,
    *,
    context_length: int,
    read: int | None = None,
    dtype: str = "auto",
    in_process: bool = True,
    low_memory: bool = False,
    enforce_eager: bool | None = None,
    progress: bool = True,
    **options: Any,
) -> LLM:
    """A running `vllm.LLM` for windows of `context_length` tokens.

    Args:
        model: name or folder.
        context_length: tokens of the longest prompt; becomes max_model_len.
        read: as many of them the model reads; one less where the last token is only predicted,
            and the model may have no position for it.
        dtype: as vLLM's.
        in_process: run the engine in this process (only with one GPU or CPU). Requests then reach
            it in a fixed order, so a repeated run has the same batches and the same last bits.
        low_memory: few sequences at a time and a small KV cache.
        enforce_eager: None: eager on a CPU, where compiling costs more than it brings.
        progress: whether to say on standard error that it starts, and when it runs.
        options: further arguments of `vllm.LLM`; None means vLLM's default.

    Raises:
        ScoreModeError: the model cannot be loaded as asked; see `vllm.score.launch.start`.
    """
    quieten()
    settings = {name: value for name, value in options.items() if value is not None}
    parallel = int(settings.get("tensor_parallel_size", 1))
    if in_process and parallel == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    from vllm.platforms import current_platform

    settings.setdefault("use_tqdm_on_load", False)
    # A model that only pools would start as one, and be refused at the first request.
    settings.setdefault("runner", "generate")
    settings.update(model=model, dtype=dtype, max_model_len=context_length)
    if low_memory:
        settings.setdefault("max_num_seqs", 4)
        settings.setdefault("max_num_batched_tokens", max(context_length, 512))
    if current_platform.is_cpu():
        # Stock prompt log-probabilities compile a kernel at run time; nothing of ours does.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        settings["enforce_eager"] = True if enforce_eager is None else enforce_eager
        if "gpu_memory_utilization" not in settings and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            settings.setdefault(
                "kv_cache_memory_bytes",
                cpu_cache_bytes(model, context_length, low_memory, settings),
            )
        if parallel == 1 and in_process:
            settings.setdefault("distributed_executor_backend", "uni")
    elif enforce_eager is not None:
        settings["enforce_eager"] = enforce_eager
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    if read is not None and read < context_length:
        settings["max_model_len"] = read
        prepare = with_room_for_one_more
    return start_llm(settings, progress=progress, options=OPTIONS, prepare=prepare)


def quieten() -> None:
    """Errors only from vLLM and its libraries, here and in child processes.

    The user's own VLLM_LOGGING_LEVEL counts more, and `--debug`.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        return
    if DEBUG.get():
        os.environ["VLLM_LOGGING_LEVEL"] = "DEBUG"
        logger = logging.getLogger("vllm")
        logger.setLevel(logging.DEBUG)
        for handler in logger.handlers:  # made when vLLM was imported
            handler.setLevel(logging.DEBUG)
        return
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    logging.getLogger("vllm").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore", FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def cpu_cache_bytes(
    model: str, context_length: int, low_memory: bool, settings: dict[str, Any]
) -> int:
    """KV cache for a few windows at a time, within a quarter of the memory that is free.

    vLLM's own default is a share of the machine's reported memory, which fails where the memory
    is reported low or used by others.
    """
    import psutil

    windows = 4 if low_memory else CPU_WINDOWS_IN_CACHE
    wanted = windows * context_length * bytes_a_token(model, settings)
    low, high = CPU_CACHE_BYTES
    return max(low, min(wanted, high, psutil.virtual_memory().available // 4))


def bytes_a_token(model: str, settings: dict[str, Any]) -> int:
    """Upper estimate of the KV cache of a token: all layers, no sharing between them, float32."""
    from transformers import AutoConfig

    from vllm.score.errors import ScoreModeError
    from vllm.score.launch.reasons import one_line

    try:
        config = AutoConfig.from_pretrained(
            model,
            trust_remote_code=bool(settings.get("trust_remote_code")),
            revision=settings.get("revision"),
        ).get_text_config()
    except Exception as error:  # of transformers, and of the model's own code
        raise ScoreModeError(
            f"model {model!r} cannot be loaded: {one_line(error)}; give a folder with a "
            "config.json, or a name that the hub knows while it can be reached."
        ) from error
    layers = getattr(config, "num_hidden_layers", 32)
    heads = getattr(config, "num_attention_heads", 32)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * layers * kv_heads * head_dim * 4)
