"""Log-probability of every token of a batch of prompts on a CPU: score mode, stock vLLM, HF.

    python benchmarks/bulk_scoring.py                         # minutes on 2 cores
    python benchmarks/bulk_scoring.py --vocab-size 151936 --prompts 8

One process, one engine, same prompts, rounds in turns. full_vocabulary.py asks for every token's
log-probability, gpu_bulk.py is this benchmark on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from engines import (
    BARE,
    SCORE,
    STOCK_OWN,
    STOCK_TOP,
    generate,
    hugging_face,
    own_logprobs,
    random_prompts,
    score_values,
    scores,
)
from harness import Contender, Target, agreement, interleave, report

HF = "Hugging Face"
TARGETS = {STOCK_TOP: (">=", 2.0), HF: (">=", 1.8)}


def main() -> None:
    options = arguments()
    import torch
    from transformers import AutoModelForCausalLM

    from vllm.score.launch.engine import open_llm
    from vllm.score.tiny.random_models import make_random_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_random_model(
            Path(folder) / "model",
            "llama",
            vocab_size=options.vocab_size,
            hidden_size=512,
            num_layers=8,
            head_dim=64,
            dtype=options.dtype,
            tie_word_embeddings=False,
        )
        llm = open_llm(
            str(model), context_length=options.length + 1, dtype=options.dtype, max_logprobs=-1
        )
        hf = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype)).eval()
        parameters = sum(p.numel() for p in hf.parameters())
        prompts = random_prompts(options.prompts, options.length, options.vocab_size)
        contenders = ways(llm, hf, prompts, options)
        results = interleave(contenders)
        report(
            "bulk_scoring",
            contenders,
            SCORE,
            {**vars(options), "parameters": parameters},
            compare(results, hf, prompts),
            "tokens/s",
            targets(contenders) if options.length >= 512 else {},
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-batch", type=int, default=4)
    return parser.parse_args()


def ways(llm: Any, hf: Any, prompts: Any, options: argparse.Namespace) -> list[Contender]:
    """The contenders."""
    work = options.prompts * options.length

    def contender(name, run, condense=None):
        return Contender(
            name,
            lambda: run(prompts),
            work,
            options.rounds,
            warm=lambda: run(prompts[:1]),
            condense=condense,
        )

    batch = options.hf_batch
    return [
        contender(SCORE, lambda p: scores(llm, p), score_values),
        contender(BARE, lambda p: generate(llm, p), lambda outputs: None),
        contender(STOCK_TOP, lambda p: generate(llm, p, prompt_logprobs=1), own_logprobs),
        contender(STOCK_OWN, lambda p: generate(llm, p, prompt_logprobs=0), own_logprobs),
        contender(f"{HF}, batch {batch}", lambda p: hugging_face(hf, p, batch, "float32")),
    ]


def targets(contenders: list[Contender]) -> dict[str, Target]:
    """What is asked of score mode at the benchmark's own sizes."""
    return {c.name: TARGETS[key] for c in contenders for key in TARGETS if c.name.startswith(key)}


def compare(results: Any, hf: Any, prompts: Any) -> dict[str, str]:
    """That all give the same numbers, and how far each is from the same weights in float32."""
    import copy

    import torch

    exact = hugging_face(copy.deepcopy(hf).to(torch.float32), prompts[:2], 2, "float32")
    found = {name: values for name, values in results.items() if values is not None}
    differences = agreement(found, SCORE, mean_limit=0.3)
    for name, values in found.items():
        error = np.abs(values[:2] - exact)
        differences[name] += (
            f"; from the same weights in float32: mean {error.mean():.1e}, "
            f"max {error.max():.1e} nats"
        )
    return differences


if __name__ == "__main__":
    main()
