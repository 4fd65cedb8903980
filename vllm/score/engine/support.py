"""What score mode does not serve: engine configurations and request options, each with its error.

The tables in SCORE_MODE_IMPLEMENTATION.md follow these two lists.
"""

from __future__ import annotations

from typing import Any

from vllm.score.engine.invalid import InvalidScoreRequest
from vllm.score.errors import ScoreModeError

# Options that mean nothing without sampling: (field, value that is accepted, what to do).
REFUSED_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("n", 1, "a prompt has one score; send the request once"),
    ("stop", [], "nothing is generated; leave it out"),
    ("stop_token_ids", [], "nothing is generated; leave it out"),
    ("min_tokens", 0, "nothing is generated; leave it out"),
    ("logprobs", None, "use prompt_logprobs, target_token_ids or score_statistics"),
    ("logprob_token_ids", None, "use target_token_ids in the prompt"),
    ("prompt_logprob_token_ids", None, "use target_token_ids in the prompt"),
    ("prompt_logprob_start", None, "use target_token_ids in the prompt"),
    ("structured_outputs", None, "scores are those of the unconstrained model; leave it out"),
    ("logit_bias", None, "scores are those of the unconstrained model; leave it out"),
    ("allowed_token_ids", None, "scores are those of the unconstrained model; leave it out"),
    ("bad_words", [], "scores are those of the unconstrained model; leave it out"),
    ("trace_decode_token_ids", None, "nothing is generated; leave it out"),
)


def check_options(params: Any) -> None:
    """Refuse sampling parameters that a score request cannot honour.

    Raises:
        InvalidScoreRequest: names the field, its value and the remedy.
    """
    for field, accepted, remedy in REFUSED_OPTIONS:
        value = getattr(params, field)
        if value is not None and value != accepted:
            raise InvalidScoreRequest(
                f"{field}={value!r} cannot be combined with score_mode=True: {remedy}.",
                parameter=field,
                value=value,
            )
    if (params.extra_args or {}).get("kv_transfer_params"):
        raise InvalidScoreRequest(
            "kv_transfer_params cannot be combined with score_mode=True: a transferred prefix has "
            "no hidden states to score.",
            parameter="extra_args",
        )


def unsupported_configuration(config: Any) -> str | None:
    """Why an engine with this `VllmConfig` cannot score, with the remedy; else None."""
    model, parallel = config.model_config, config.parallel_config
    speculative = config.speculative_config
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
            config.kv_transfer_config is not None,
            "KV connectors are not supported: a transferred prefix has no hidden states to score",
        ),
        (
            bool(config.cache_config.kv_sharing_fast_prefill),
            "kv_sharing_fast_prefill skips the hidden states that are scored; switch it off",
        ),
        (
            speculative is not None and speculative.method != "ngram",
            "of the speculative methods only 'ngram' is supported yet; start without it",
        ),
        (
            bool(model.return_sampling_mask),
            "engines that return sampling masks are not supported",
        ),
    )
    for refused, sentence in checks:
        if refused:
            return f"score_mode: {sentence}."
    return None


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


def check_prompt(engine_input: Any, resumable: bool) -> None:
    """Refuse kinds of prompt that cannot be scored.

    Raises:
        InvalidScoreRequest: names the kind and the remedy.
    """
    kind = engine_input.get("type")
    if kind == "embeds":
        raise InvalidScoreRequest(
            "prompt_embeds cannot be combined with score_mode=True: give prompt_token_ids.",
            parameter="prompt_embeds",
        )
    if kind == "multimodal":
        raise InvalidScoreRequest(
            "multi_modal_data cannot be combined with score_mode=True yet: score text prompts.",
            parameter="multi_modal_data",
        )
    if kind != "token":
        raise InvalidScoreRequest(
            f"a prompt of type {kind!r} cannot be combined with score_mode=True: give "
            "prompt_token_ids.",
            parameter="prompt",
            value=kind,
        )
    if resumable:
        raise InvalidScoreRequest(
            "streaming input cannot be combined with score_mode=True: send the whole prompt.",
            parameter="resumable",
        )
