"""What the scripts that start an engine share; the engine must not be imported before they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROMPTS = [[5, 17, 99, 3, 250], [7, 8, 9], [301, 44, 12, 600, 2, 71, 90, 14]]
SCORED = [11, 402, 77, 5, 630, 218, 9, 50]


def start(model: str, **options: Any) -> Any:
    """A small float32 engine."""
    from vllm import LLM

    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": 256 << 20,
        "max_model_len": 512,
        **options,
    }
    return LLM(model, **settings)


def greedy_tokens(llm: Any) -> list[list[int]]:
    """Ordinary generation: 6 tokens for each of `PROMPTS`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def attempt(call: Callable[[], Any]) -> list[Any]:
    """Type and message of the error, or "scores" and their log-probabilities."""
    try:
        result = call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["scores", result]


def scores_by_function(llm: Any) -> list[Any]:
    """`vllm.score.score` of `SCORED`."""
    from vllm.score import score

    return attempt(lambda: score(llm, [SCORED], use_tqdm=False)[0].logprobs.tolist())


def scores_by_reasoning(llm: Any) -> list[Any]:
    """The answers' log-probabilities before any reasoning: not a trace of failed decisions."""
    from vllm.score.eig import expected_information_gain_reasoning

    def call() -> list[float]:
        (trace,) = expected_information_gain_reasoning(
            llm, [SCORED], candidates=["a", "b"], max_tokens_thinking=0, use_tqdm=False
        )
        posterior = trace.steps[-1].decision.posterior
        return [] if posterior is None else posterior.logprobs.tolist()

    return attempt(call)


def scores_by_generate(llm: Any) -> list[Any]:
    """`LLM.generate` of `SCORED`, as a user of stock vLLM would write it."""
    from vllm import SamplingParams

    def call() -> list[float]:
        prompt = {"prompt_token_ids": SCORED, "target_token_ids": SCORED[1:]}
        (output,) = llm.generate([prompt], SamplingParams(score_mode=True), use_tqdm=False)
        assert list(output.outputs[0].token_ids) == []
        return output.scores.logprobs.tolist()

    return attempt(call)
