"""Perplexity runs in a process of their own.

`engine_run.py MODEL store STORE` does one run into STORE, as the shared fixture's engine would.
`engine_run.py MODEL repeat RUNS` does some, each of one batch, and prints the exact loss of each.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.perplexity.texts import PROSE

TEXT = PROSE[:8_000]
SETTINGS: dict[str, Any] = {"context_length": 256, "stride": 64, "group_tokens": 2048}
# Many windows in a batch and several in a step: which ones is what moves the last bits.
ONE_BATCH: dict[str, Any] = {"context_length": 512, "stride": 100}
LARGE_STEP = 2048


def main(model: str, task: str, argument: str) -> None:
    from tests.conftest import MAX_MODEL_LEN, SMALL_CACHE, SMALL_CHUNKS
    from vllm import LLM
    from vllm.score.perplexity import perplexity

    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        **SMALL_CACHE,
        distributed_executor_backend="uni",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=SMALL_CHUNKS if task == "store" else LARGE_STEP,
        max_num_seqs=64,
    )
    if task == "store":
        perplexity(llm, TEXT, store=argument, use_tqdm=False, **SETTINGS)
        return
    for _ in range(int(argument)):
        result = perplexity(llm, TEXT, use_tqdm=False, **ONE_BATCH)
        print("loss", result.nll.hex(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
