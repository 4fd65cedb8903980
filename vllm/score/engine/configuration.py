"""What score mode says of an engine: which are refused, what to warn of, and their length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from vllm.score.engine.request import InvalidScoreRequest
from vllm.score.errors import ScoreModeError
from vllm.score.ops.statistics import MAX_EXACT_ID

# Llama 4 scales its attention in vLLM where max_model_len is above this, unless its generation
# config says whether to.
_LLAMA4_PLAIN_ATTENTION = 32768

# Parts of a model that are called outside of the compiled graph, and the model itself.
_OUTSIDE = ("", "lm_head", "logits_processor")


def unsupported_configuration(config: Any) -> str | None:
    """Why an engine with this `VllmConfig` cannot score, with the remedy; else None."""
    model, parallel = config.model_config, config.parallel_config
    speculative, connectors = config.speculative_config, _connectors(config.kv_transfer_config)
    # The table in SCORE_MODE_IMPLEMENTATION.md follows this list.
    checks: tuple[tuple[bool, str], ...] = (
        (model.runner_type != "generate", "pooling models have no next-token probabilities"),
        (bool(model.is_encoder_decoder), "encoder-decoder models are not supported"),
        (bool(model.is_diffusion), "diffusion models have no next-token probabilities"),
        (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1,
            "context parallelism is not supported; use tensor_parallel_size",
        ),
        (
            parallel.distributed_executor_backend == "external_launcher"
            and parallel.pipeline_parallel_size > 1,
            "external_launcher cannot run pipeline parallelism with it; use tensor_parallel_size",
        ),
        (
            "DecodeBenchConnector" in connectors,
            "DecodeBenchConnector fills the KV cache with made-up numbers; use another connector",
        ),
        (
            "MoRIIOConnector" in connectors and config.kv_transfer_config.kv_role != "kv_producer",
            "MoRIIOConnector takes prefixes for loaded that nobody has sent; score on the engine "
            "with kv_role='kv_producer'",
        ),
        (
            bool(config.cache_config.kv_sharing_fast_prefill),
            "kv_sharing_fast_prefill skips the hidden states that are scored; switch it off",
        ),
        (
            speculative is not None and bool(speculative.enable_adaptive_verification),
            "enable_adaptive_verification moves rows on the GPU alone; leave it out of the "
            "speculative_config",
        ),
        (bool(model.return_sampling_mask), "engines that return sampling masks are not supported"),
        (
            model.get_vocab_size() > MAX_EXACT_ID,
            f"vocabularies of more than {MAX_EXACT_ID:,} tokens are not supported",
        ),
    )
    sentence = next((sentence for refused, sentence in checks if refused), None)
    return sentence and f"score_mode: {sentence}."


def _connectors(kv_transfer_config: Any) -> set[str]:
    """Names of the engine's KV connectors, those of a `MultiConnector` among them."""
    if kv_transfer_config is None:
        return set()
    several = kv_transfer_config.kv_connector_extra_config.get("connectors", ())
    return {kv_transfer_config.kv_connector, *(one.get("kv_connector") for one in several)}


def check_configuration(config: Any) -> None:
    """Raise InvalidScoreRequest when an engine with this `VllmConfig` cannot score."""
    sentence = unsupported_configuration(config)
    if sentence is not None:
        raise InvalidScoreRequest(sentence, parameter="score_mode")


def check_llm(llm: Any) -> None:
    """Raise ScoreModeError for what is no `LLM`."""
    if not hasattr(llm, "llm_engine"):
        raise ScoreModeError(
            f"llm is a {type(llm).__name__}; give a vllm.LLM, which scores in this process or "
            "another, e.g. LLM(model=...)."
        )


def confuses_adapters(config: Any) -> bool:
    """Whether requests without a LoRA adapter may be computed with another request's.

    vLLM 0.32.0 on a CPU takes -1, "no adapter", for the index of the last slot: in a step with both
    kinds of requests, rows without an adapter are computed with one, their keys and values too. All
    that is done about it:

    * `score()` sends the two kinds one after the other;
    * at admission (`process_inputs` in `vllm.score.patches`) a request without an adapter is told
      to read no cached prefixes;
    * in the V1 runner (`vllm.score.patches`) a step with both kinds marks the scores of those
      without an adapter as `spoiled`: they are NaN;
    * the error for NaN (`vllm.score.results`) names it among the causes.
    """
    from vllm.platforms import current_platform

    return config.lora_config is not None and bool(current_platform.is_cpu())


def with_room_for_one_more(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `vllm.LLM` with a max_model_len larger by one.

    vLLM refuses a prompt of max_model_len tokens, as one more is to be generated. A score request
    generates none, and its last token is predicted but not read: to read N tokens, and predict the
    one after them, it needs an engine with max_model_len = N + 1. No position beyond N is ever
    computed.

    The settings are returned as they are where the larger number would change what the model
    computes, or vLLM cannot be told to accept it.

    Args:
        settings: of `vllm.LLM`. Without max_model_len it is as long as vLLM makes it by itself.

    Raises:
        Exception: what vLLM raises for settings that it refuses.
    """
    config = model_config(settings)
    length = int(config.max_model_len)
    larger = {**settings, "max_model_len": length + 1}
    # Whole prompts must fit into the batches where they may not be cut.
    cut = settings.get("enable_chunked_prefill") is not False
    batch = None if cut else settings.get("max_num_batched_tokens")
    if _changes_the_model(config, length) or (batch is not None and int(batch) <= length):
        return dict(settings)
    try:
        config.get_and_verify_max_len(length + 1)
    except ValueError:
        # The model's own limit. vLLM goes beyond it where the configuration names another one.
        overrides = settings.get("hf_overrides") or {}
        if not isinstance(overrides, Mapping):
            return dict(settings)
        limit: dict[str, Any] = {"model_max_length": length + 1}
        if config.hf_text_config is not config.hf_config:
            # A multimodal model's configuration of its language model, as vLLM takes it from there.
            parts = vars(config.hf_config).items()
            name = next((name for name, part in parts if part is config.hf_text_config), None)
            if name is None:
                return dict(settings)
            limit = {name: {**overrides.get(name, {}), **limit}}
        larger["hf_overrides"] = {**overrides, **limit}
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
    text = config.hf_text_config
    if "llama4" in text.model_type and length == _LLAMA4_PLAIN_ATTENTION:
        return True
    # LongRoPE has one set of factors up to this length, and another beyond it.
    originals = [getattr(text, "original_max_position_embeddings", None)]
    rope = getattr(text, "rope_parameters", None) or {}
    # One set for all layers, or one for each type of layer.
    rope = [parameters for parameters in rope.values() if isinstance(parameters, dict)] or [rope]
    originals += [parameters.get("original_max_position_embeddings") for parameters in rope]
    longrope = any(parameters.get("rope_type") == "longrope" for parameters in rope)
    return longrope and length in originals


def unread_rows_problem(worker: Any) -> str | None:
    """Why a worker may not compute rows that are scored, with the remedy; else None.

    DeepSeek-V4.1's decoder-side replay runs the last layers on the last 128 rows of a prefill and
    leaves zeros in the others, but for requests whose rows somebody reads. vLLM 0.32.0 takes those
    for such that ask for `prompt_logprobs`, 0.33.0 also those with `prompt_logprob_token_ids`,
    which score requests set.
    """
    state = getattr(worker.model_runner, "model_state", None)
    if getattr(state, "decoder_replay_layers", None) is None:
        return None
    admits = (vars(cls).get("add_request") for cls in type(state).__mro__)
    if any(f and "prompt_logprob_token_ids" in f.__code__.co_names for f in admits):
        return None
    return (
        "this vLLM leaves out most rows of a prompt in the last layers of DeepSeek-V4.1; start the "
        "engine with swa_bounded_replay=False (--no-swa-bounded-replay)."
    )


def not_causal_problem(model: Any) -> str | None:
    """Why nothing of a model can be scored whose prompts attend forwards, too (HRM-text); or None.

    Args:
        model: the worker's, a `torch.nn.Module`.
    """
    from vllm.model_executor.layers.attention import EncoderOnlyAttention, PrefillPrefixLMAttention

    kinds = (EncoderOnlyAttention, PrefillPrefixLMAttention)
    found = next((name for name, m in model.named_modules() if isinstance(m, kinds)), None)
    if found is None:
        return None
    return (
        f"the tokens of a prompt see those behind them in this model ({found}): its predictions of "
        "a prompt are none; score a causal model."
    )


def cpu_rotary_warning(worker: Any, model: Any) -> str | None:
    """What to tell a user whose model has queries that vLLM rotates wrongly on a CPU; else None.

    vLLM 0.32.0's kernel takes [tokens, size]. Given [tokens, heads, size], as by latent attention
    and by LFM2, whose layers have short convolutions, it rotates by other tokens' positions: stock
    generation and scores alike are off by nats, and change with what follows in a step.

    Args:
        model: the worker's, a `torch.nn.Module`.
    """
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.model_executor.layers.mamba.short_conv import ShortConv

    if "-rotary_embedding" in worker.vllm_config.compilation_config.custom_ops:
        return None
    if not any(isinstance(module, (MLAAttention, ShortConv)) for module in model.modules()):
        return None
    return (
        "vLLM's rotary embedding on a CPU is wrong for queries as this model has them. Generations "
        "and scores are those of another one; start the engine with "
        "compilation_config={'custom_ops': ['-rotary_embedding']}."
    )


def dead_hooks_warning(worker: Any, model: Any) -> str | None:
    """Names hooked modules inside a compiled model, whose hooks are not run; else None."""
    from vllm.config import CompilationMode

    if worker.vllm_config.compilation_config.mode in (None, CompilationMode.NONE):
        return None
    hooked = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] not in _OUTSIDE
        and (module._forward_hooks or module._forward_pre_hooks)
    ]
    if not hooked:
        return None
    shown = ", ".join(hooked[:3]) + (", ..." if len(hooked) > 3 else "")
    return (
        f"hooks on {shown} have no effect: the engine compiles the model, and compiled graphs do "
        "not run them; start it with enforce_eager=True."
    )


def int8_warning(model: Any) -> str | None:
    """What to tell a user whose model multiplies int8 numbers on a CPU that cannot; else None.

    Args:
        model: the worker's, a `torch.nn.Module`.
    """
    kernels = (getattr(getattr(m, "scheme", None), "kernel", None) for m in model.modules())
    used = any(type(kernel).__name__ == "CPUInt8ScaledMMLinearKernel" for kernel in kernels)
    error = cpu_int8_error() if used else 0.0
    if error == 0:
        return None
    return (
        f"vLLM's int8 product is off by {error:.0%} on this CPU, which has no VNNI instructions: "
        "weights beyond ±64 overflow. Generations and scores of this model are those of another "
        "one; use a machine with VNNI (or AMX), or another format."
    )


def cpu_int8_error(largest_weight: int = 127) -> float:
    """Error of vLLM's int8 product on this CPU, relative to the product's standard deviation.

    int8 products are sums of whole numbers, so 0 is what to expect. On x86 without VNNI
    instructions oneDNN adds pairs of products in 16 bits, which overflow (and stay at 32,767) when
    two weights beyond ±64 meet large inputs: stock generation and scores alike are then those of
    another model.

    Args:
        largest_weight: weights are drawn from -largest_weight..largest_weight.
    """
    import torch

    from vllm import _custom_ops as ops

    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = 64, 128, 256
    limits = (-largest_weight, largest_weight + 1)
    weight = torch.randint(*limits, (outputs, inputs), generator=generator, dtype=torch.int8)
    hidden = torch.randint(-127, 128, (rows, inputs), generator=generator).float()
    hidden[:, 0] = 127.0  # the scale of every row is 1
    scales = torch.ones(outputs, 1)  # oneDNN keeps no copy: it must outlive the product
    product = ops.create_onednn_scaled_mm(weight.t(), scales, torch.float32, True, False, 32)
    rounded, scale, _ = ops.onednn_scaled_int8_quant(hidden, None, None, True)
    found = torch.empty(rows, outputs)
    ops.onednn_scaled_mm(product, rounded, found, scale, None, None, None)
    exact = hidden.double() @ weight.double().t()
    return float((found - exact).pow(2).mean().sqrt() / exact.std())
