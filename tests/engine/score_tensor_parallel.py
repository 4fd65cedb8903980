"""Run as a program by test_tensor_parallel.py: scores of a model sharded over two workers, also
beside interventions in the workers."""

from __future__ import annotations

import json
import sys


def main(model: str, inputs_file: str, out_file: str) -> None:
    from tests.sequence import interventions
    from vllm import LLM
    from vllm.score import score
    from vllm.score.patches.front_end import ask_engine
    from vllm.score.sequence import SequenceProbVLLMHook

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
    with open(inputs_file) as file:
        inputs = json.load(file)
    prompts = inputs["prompts"]
    scores = score(llm, prompts, statistics=["entropy", "argmax", "rank"], use_tqdm=False)
    (top,) = score(llm, prompts[1:2], top=5, use_tqdm=False)
    (full,) = score(llm, prompts[1:2], full_vocabulary=True, use_tqdm=False)
    hook = SequenceProbVLLMHook(llm)
    pairs = inputs["contexts"], inputs["targets"]
    sequences = {"plain": hook.get_log_prob(*pairs)}
    for name, value in inputs["interventions"].items():
        llm.collective_rpc(getattr(interventions, name), args=(value,))
        sequences[name] = hook.get_log_prob(*pairs)
        assert llm.collective_rpc(interventions.remove_hooks) == [1, 1]
    sequences["again"] = hook.get_log_prob(*pairs)
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
                "sequences": sequences,
            },
            file,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
