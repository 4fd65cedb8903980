"""Run as a program by test_tensor_parallel.py: scores of a model sharded over two workers."""

from __future__ import annotations

import json
import sys


def main(model: str, prompts_file: str, out_file: str) -> None:
    from vllm import LLM
    from vllm.score import score
    from vllm.score.patches.llm_engine import ask_engine

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=256,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        kv_cache_memory_bytes=128 << 20,
    )
    with open(prompts_file) as file:
        prompts = json.load(file)
    scores = score(llm, prompts, statistics=["entropy", "argmax", "rank"], use_tqdm=False)
    (top,) = score(llm, prompts[1:2], top=5, use_tqdm=False)
    (full,) = score(llm, prompts[1:2], full_vocabulary=True, use_tqdm=False)
    roles = [s["role"] for s in ask_engine(llm.llm_engine)]
    with open(out_file, "w") as file:
        json.dump(
            {
                "roles": roles,
                "logprobs": [s.logprobs.tolist() for s in scores],
                "entropy": [s.statistics["entropy"].tolist() for s in scores],
                "argmax": [s.statistics["argmax"].tolist() for s in scores],
                "rank": [s.statistics["rank"].tolist() for s in scores],
                "top": top.top_token_ids.tolist(),
                "full": full.logprobs.tolist(),
            },
            file,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
