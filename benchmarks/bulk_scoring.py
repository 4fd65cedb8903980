"""Log-probability of every token of a batch of prompts: score mode, stock vLLM, Hugging Face.

    python benchmarks/bulk_scoring.py                    # the default sizes, minutes on 2 cores
    python benchmarks/bulk_scoring.py --full-vocabulary  # one prompt's whole vocabulary instead

One process, one engine, same prompts, rounds in turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from harness import Contender, interleave, report

SCORE = "score mode"


def main() -> None:
    options = arguments()
    import torch
    from transformers import AutoModelForCausalLM

    from vllm.score.cli.engine import open_llm
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
        rng = np.random.default_rng(0)
        shape = (options.prompts, options.length)
        prompts = rng.integers(2, options.vocab_size, shape).tolist()
        if options.full_vocabulary:
            contenders, compare = full_vocabulary(llm, prompts, options)
        else:
            contenders, compare = targets(llm, hf, prompts, options)
        results = interleave(contenders)
        report(
            "full_vocabulary" if options.full_vocabulary else "bulk_scoring",
            contenders,
            SCORE,
            {**vars(options), "parameters": parameters},
            compare(results),
            "tokens/s",
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-batch", type=int, default=4)
    parser.add_argument("--full-vocabulary", action="store_true")
    return parser.parse_args()


def generate(llm, prompts, **sampling):
    """Stock vLLM, one token generated, nothing from the prefix cache."""
    from vllm import SamplingParams

    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=1, temperature=0, skip_reading_prefix_cache=True, **sampling),
        use_tqdm=False,
    )


def own_logprobs(outputs, prompts) -> np.ndarray:
    return np.array(
        [
            [o.prompt_logprobs[i][p[i]].logprob for i in range(1, len(p))]
            for o, p in zip(outputs, prompts, strict=True)
        ]
    )


def hugging_face(hf, prompts, batch: int) -> np.ndarray:
    """Float32 log-softmax of the logits, a batch at a time, as lm-eval's hf backend does."""
    import torch

    rows = []
    with torch.inference_mode():
        for first in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[first : first + batch])
            logits = hf(ids).logits[:, :-1]
            logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
            rows.append(logprobs.gather(-1, ids[:, 1:, None])[..., 0].numpy())
    return np.concatenate(rows)


def targets(llm, hf, prompts, options):
    from vllm.score import score

    work = options.prompts * options.length

    def contender(name, run):
        return Contender(
            name, lambda: run(prompts), work, options.rounds, warm=lambda: run(prompts[:1])
        )

    contenders = [
        contender(SCORE, lambda p: score(llm, p, use_tqdm=False, skip_prefix_cache=True)),
        contender("bare prefill (no scores)", lambda p: generate(llm, p)),
        contender("stock prompt_logprobs=1", lambda p: generate(llm, p, prompt_logprobs=1)),
        contender("stock prompt_logprobs=0", lambda p: generate(llm, p, prompt_logprobs=0)),
        contender(
            f"Hugging Face, batch {options.hf_batch}",
            lambda p: hugging_face(hf, p, options.hf_batch),
        ),
    ]

    def compare(results):
        import copy

        import torch

        exact = hugging_face(copy.deepcopy(hf).to(torch.float32), prompts[:2], 2)
        found = {
            SCORE: np.array([s.logprobs for s in results[SCORE]]),
            contenders[2].name: own_logprobs(results[contenders[2].name], prompts),
            contenders[3].name: own_logprobs(results[contenders[3].name], prompts),
            contenders[4].name: results[contenders[4].name],
        }
        differences = {}
        for name, values in found.items():
            error = np.abs(values[:2] - exact)
            differences[name] = (
                f"mean NLL {-values.mean():.5f}; from the same weights in float32: mean "
                f"{error.mean():.1e}, max {error.max():.1e} nats"
            )
            # The same work: a contender that answers something else is no contender.
            if not np.allclose(values.mean(), found[SCORE].mean(), atol=2e-2):
                raise SystemExit(f"{name} does not give the same numbers: {differences[name]}")
        return differences

    return contenders, compare


def full_vocabulary(llm, prompts, options):
    from vllm.score import score

    one = [prompts[0][: min(options.length, 64)]]
    work = len(one[0])
    stock = "stock prompt_logprobs=-1"
    contenders = [
        Contender(
            SCORE,
            lambda: score(llm, one, full_vocabulary=True, use_tqdm=False, skip_prefix_cache=True),
            work,
            options.rounds,
        ),
        Contender(stock, lambda: generate(llm, one, prompt_logprobs=-1), work, options.rounds),
    ]

    def compare(results):
        ours = results[SCORE][0].logprobs
        theirs = np.full_like(ours, np.nan)
        for i, row in enumerate(results[stock][0].prompt_logprobs[1:]):
            for token, entry in row.items():
                theirs[i, token] = entry.logprob
        difference = np.abs(ours - theirs)
        if not difference.max() < 0.5:
            raise SystemExit(f"the log-probabilities differ by {difference.max()} nats")
        return {
            stock: f"from score mode: mean {difference.mean():.1e}, max {difference.max():.1e} nats"
        }

    return contenders, compare


if __name__ == "__main__":
    main()
