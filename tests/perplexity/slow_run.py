"""A run that takes its time, to be killed; as a program: `slow_run.py STORE`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.perplexity.bigram import IDENTITY, Bigram
from vllm.score.data import as_source
from vllm.score.perplexity import Job, PerplexityResult, Settings, prepare
from vllm.score.perplexity.run import score_job
from vllm.score.perplexity.windows import Window

VOCABULARY = 300


class Slow(Bigram):
    """Says so after each batch."""

    def score(self, windows: Sequence[Window]) -> list[np.ndarray]:
        found = super().score(windows)
        time.sleep(0.01)
        print("scored", flush=True)
        return found


def job() -> Job:
    """Token ids only: nothing heavy to import."""
    settings = Settings(
        context_length=96,
        stride=40,
        separator=None,
        conventions=("hf-stride", "gptq:96", "llama.cpp:64"),
        group_tokens=1000,
    )
    return prepare(
        settings, as_source(np.random.default_rng(1).integers(0, VOCABULARY, 6000)), None
    )


def run(model: Bigram, store: Path | None) -> PerplexityResult:
    resume = store is not None
    return score_job(job(), model.score, IDENTITY, store=store, resume=resume, use_tqdm=False)


if __name__ == "__main__":
    run(Slow(VOCABULARY), Path(sys.argv[1]))
