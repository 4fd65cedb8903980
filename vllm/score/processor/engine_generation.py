"""Responses sampled by the vLLM engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.processor.stop import TAG, response_length
from vllm.score.processor.types import GenerationConfig

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


def generate_with_engine(
    llm: LLM,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    num_responses: int,
    config: GenerationConfig,
    *,
    eos_token_ids: Sequence[int],
    seed: int | None = None,
    lora_request: LoRARequest | None = None,
) -> list[list[list[int]]]:
    """Sample responses under `config`'s temperature and top-p alone.

    Args:
        prompts: [B] token ids.
        num_responses: G.
        eos_token_ids: end a response, as does the answer tag.
        seed: of the engine's sampler, for the same responses again.

    Returns:
        [B][G] lists of generated ids, the end-of-sequence token included.

    Raises:
        ScoreModeError: a prompt leaves no room for `max_new_tokens`.
    """
    from vllm import SamplingParams

    _check_lengths(llm, prompts, config)
    params = SamplingParams(
        n=num_responses,
        temperature=config.temperature if config.do_sample else 0.0,
        top_p=config.top_p if config.do_sample else 1.0,
        max_tokens=config.max_new_tokens,
        stop=[TAG],
        include_stop_str_in_output=True,
        stop_token_ids=list(eos_token_ids),
        skip_special_tokens=False,
        seed=seed,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        params,
        use_tqdm=False,
        lora_request=lora_request,
    )
    responses = [[list(o.token_ids) for o in output.outputs] for output in outputs]
    return [
        [ids[: response_length(ids, tokenizer, eos_token_ids)] for ids in group]
        for group in responses
    ]


def engine_eos_token_ids(llm: LLM) -> list[int]:
    """Ids that the model's generation config names as ends of a sequence."""
    given = (llm.llm_engine.model_config.try_get_generation_config() or {}).get("eos_token_id")
    return [given] if isinstance(given, int) else list(given or [])


def _check_lengths(llm: LLM, prompts: Sequence[list[int]], config: GenerationConfig) -> None:
    room = llm.llm_engine.model_config.max_model_len - config.max_new_tokens
    for i, ids in enumerate(prompts):
        if len(ids) > room:
            raise ScoreModeError(
                f"prompts[{i}] has {len(ids)} tokens; with max_new_tokens={config.max_new_tokens} "
                f"the engine's max_model_len leaves {max(room, 0)}: lower max_new_tokens, or start "
                "the engine with a larger max_model_len."
            )
