"""Run as a program by test_hybrid.py: a model with a recurrent state, with and without the cache.

In a process of its own: vLLM makes the process groups that experts need with the first engine.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch

VOCABULARY = 512
CONTEXT, TAILS = 690, (24, 5, 9, 300)


def make_model(folder: str) -> Any:
    """A random model with the layers of Qwen3-Next, saved; returned in float32."""
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    from vllm.score.tiny.random_models import _default_tokenizer

    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,  # the fourth has full attention
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(4)  # the initial weights make every distribution flat
    model.save_pretrained(folder)
    _default_tokenizer(VOCABULARY).save_pretrained(folder)
    return model.eval()


def reference(model: Any, ids: list[int], targets: list[int]) -> list[float]:
    """Log-probabilities of the last tokens."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0, -len(targets) - 1 : -1].log_softmax(-1)
    return rows.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()


def main(folder: str, out_file: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.score import score

    model = make_model(folder)
    llm = LLM(
        folder,
        dtype="bfloat16",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=128 << 20,
        distributed_executor_backend="uni",
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=16,
        enable_prefix_caching=True,
    )
    rng = np.random.default_rng(1)
    context = rng.integers(2, VOCABULARY, CONTEXT).tolist()
    tails = [rng.integers(2, VOCABULARY, n).tolist() for n in TAILS]
    requests = [{"prompt_token_ids": context + t, "target_token_ids": t} for t in tails]
    rounds = [
        llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False) for _ in range(2)
    ]
    alone = [
        score(llm, [request], skip_prefix_cache=True, use_tqdm=False)[0].logprobs.tolist()
        for request in requests
    ]
    with open(out_file, "w") as file:
        json.dump(
            {
                "block": llm.llm_engine.vllm_config.cache_config.mamba_block_size,
                "cached": [[o.num_cached_tokens for o in outputs] for outputs in rounds],
                "scores": [[o.scores.logprobs.tolist() for o in outputs] for outputs in rounds],
                "alone": alone,
                "reference": [reference(model, context + t, t) for t in tails],
            },
            file,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
