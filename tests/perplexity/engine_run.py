"""A perplexity run in a process of its own: `engine_run.py MODEL STORE RUNS STEP`.

Does as many runs as asked, in one engine with the settings of the shared fixture but steps of STEP
tokens, the first into STORE ("" for none); prints the exact loss of each.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.perplexity.texts import PROSE

TEXT = PROSE[:8_000]
SETTINGS: dict[str, Any] = {"context_length": 256, "stride": 64, "group_tokens": 2048}


def main(model: str, store: str, runs: int, step: int) -> None:
    from tests.conftest import MAX_MODEL_LEN
    from vllm import LLM
    from vllm.score.perplexity import perplexity

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        distributed_executor_backend="uni",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=step,
        max_num_seqs=64,
    )
    for number in range(runs):
        folder = store if store and number == 0 else None
        result = perplexity(llm, TEXT, store=folder, use_tqdm=False, **SETTINGS)
        print("loss", result.nll.hex(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
