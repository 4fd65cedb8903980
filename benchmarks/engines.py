"""What the benchmarks run: vLLM's engine and Hugging Face, and the ways to ask them for scores.

Nothing here imports vLLM before `prepare` has set the environment.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np

SCORE = "score mode"
BARE = "bare prefill (no scores)"
STOCK_TOP = "stock prompt_logprobs=1"
STOCK_OWN = "stock prompt_logprobs=0"
STOCK_IDS = "stock prompt_logprob_token_ids"


def on_gpu() -> bool:
    """Whether there is a GPU to benchmark."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # initialises nothing
    import torch

    return torch.cuda.is_available()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the engine."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runner", choices=("v1", "v2"), help="by default vLLM's own choice")
    parser.add_argument("--eager", action="store_true", help="no torch.compile, no CUDA graphs")
    parser.add_argument("--batched-tokens", type=int, help="max_num_batched_tokens")
    parser.add_argument(
        "--gpu-memory", type=float, default=0.5, help="the engine's share of the GPU's memory"
    )


def prepare(options: argparse.Namespace) -> None:
    """Set the environment that vLLM reads when it is imported."""
    multiprocess = getattr(options, "multiprocess", False)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if multiprocess else "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if options.runner:
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if options.runner == "v2" else "0"
    if not on_gpu():
        # Stock prompt log-probabilities compile a kernel at run time.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def open_engine(folder: str, length: int, options: argparse.Namespace, **more: Any) -> Any:
    """An `LLM` with weights drawn by name, for prompts of `length` tokens.

    Args:
        folder: holds a config.json.
        more: of `LLM`'s arguments.
    """
    import random_weights

    from vllm import LLM
    from vllm.score.launch.engine import starting

    settings: dict[str, Any] = {
        "load_format": random_weights.LOAD_FORMAT,
        "worker_extension_cls": "random_weights.HiddenStates",
        "dtype": "bfloat16",
        # Stock prompt log-probabilities need room for a generated token.
        "max_model_len": length + 1,
        "max_logprobs": -1,
        "use_tqdm_on_load": False,
        "enforce_eager": options.eager,
    }
    if options.batched_tokens:
        settings["max_num_batched_tokens"] = options.batched_tokens
    if on_gpu():
        settings["gpu_memory_utilization"] = options.gpu_memory
    else:
        settings.update(enforce_eager=True, kv_cache_memory_bytes=512 << 20)
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0" and not more:
            settings["distributed_executor_backend"] = "uni"
    with starting(folder, progress=False):
        return LLM(**{"model": folder, **settings, **more})


def describe(llm: Any) -> dict[str, Any]:
    """What a figure depends on in the engine's configuration."""
    from vllm.score.patches.front_end import ask_engine

    config = llm.llm_engine.vllm_config
    kernels = [s["kernel"] for s in ask_engine(llm.llm_engine) if s["role"] == "worker"]
    return {
        "kernel": "; ".join(f"{k.get('name')}: {k.get('reason')}" for k in kernels),
        "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
        "model_runner": "v2" if config.use_v2_model_runner else "v1",
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "enforce_eager": config.model_config.enforce_eager,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "in_process": os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0",
    }


def serves_token_ids(llm: Any) -> bool:
    """Whether stock vLLM serves prompt_logprob_token_ids here: only the V2 runner does."""
    return bool(llm.llm_engine.vllm_config.use_v2_model_runner)


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Prompts of uniformly random tokens."""
    return np.random.default_rng(seed).integers(2, vocab_size, (count, length)).tolist()


def scores(llm: Any, prompts: list[list[int]], **options: Any) -> Any:
    """Score mode, nothing from the prefix cache."""
    from vllm.score import score

    return score(llm, prompts, use_tqdm=False, skip_prefix_cache=True, **options)


def generate(llm: Any, prompts: list[list[int]], **sampling: Any) -> Any:
    """Stock vLLM, one token generated, nothing from the prefix cache."""
    from vllm import SamplingParams

    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=1, temperature=0, skip_reading_prefix_cache=True, **sampling),
        use_tqdm=False,
    )


def generate_token_ids(llm: Any, prompts: list[list[int]]) -> Any:
    """Stock vLLM's log-probabilities of given tokens: the prompt's own."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0,
            skip_reading_prefix_cache=True,
            prompt_logprob_token_ids=np.array(p[1:], dtype=np.int32)[:, None],
            prompt_logprob_start=0,
        )
        for p in prompts
    ]
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def score_values(results: Any) -> np.ndarray:
    """[prompts, n-1] from score mode's results."""
    return np.array([r.logprobs for r in results])


def own_logprobs(outputs: Any) -> np.ndarray:
    """[prompts, n-1], the prompt's own tokens from stock vLLM's dicts."""
    return np.array(
        [
            [o.prompt_logprobs[i][t].logprob for i, t in enumerate(o.prompt_token_ids) if i]
            for o in outputs
        ]
    )


def token_id_values(outputs: Any) -> np.ndarray:
    """[prompts, n-1] from prompt_logprob_token_ids."""
    return np.array([o.prompt_token_id_logprobs[:, 0] for o in outputs])


def hugging_face(hf: Any, prompts: list[list[int]], batch: int, softmax: str) -> np.ndarray:
    """Log-softmax of the logits a batch at a time, as lm-eval's hf backend does.

    Args:
        softmax: dtype of the log-softmax; lm-eval leaves it that of the logits unless told.

    Returns:
        [prompts, n-1].
    """
    import torch

    rows = []
    device = next(hf.parameters()).device
    with torch.inference_mode():
        for first in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[first : first + batch], device=device)
            logits = hf(ids[:, :-1], use_cache=False).logits
            logprobs = torch.log_softmax(logits, -1, dtype=getattr(torch, softmax))
            rows.append(logprobs.gather(-1, ids[:, 1:, None])[..., 0].float().cpu().numpy())
            del logits, logprobs
    return np.concatenate(rows)


def ways_to_score(llm: Any) -> dict[str, Callable[[list[list[int]]], np.ndarray]]:
    """By contender: prompts to [prompts, n-1] log-probabilities, all from the same engine."""
    ways = {
        SCORE: lambda prompts: score_values(scores(llm, prompts)),
        STOCK_OWN: lambda prompts: own_logprobs(generate(llm, prompts, prompt_logprobs=0)),
    }
    if serves_token_ids(llm):
        ways[STOCK_IDS] = lambda prompts: token_id_values(generate_token_ids(llm, prompts))
    return ways


def with_exact(llm: Any, way: Callable[..., np.ndarray], prompts: list[list[int]]) -> Any:
    """Score the prompts one by one, and again by a float64 head over the same hidden states.

    The engine must be eager and `capture_hidden_states` called; see `random_weights`.

    Returns:
        (values, exact, logit_std, logit_max): two float64 [prompts, n-1] and the logits' spread.
    """
    values, exact = [], []
    for prompt in prompts:
        values.append(way([prompt])[0])
        answers = llm.collective_rpc("exact_logprobs", args=(prompt[1:],))
        exact.append(next(answer for answer in answers if answer is not None))
    return (
        np.array(values, dtype=np.float64),
        np.array([e["logprobs"] for e in exact]),
        float(np.mean([e["logit_std"] for e in exact])),
        max(e["logit_max"] for e in exact),
    )
