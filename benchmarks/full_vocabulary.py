"""Log-probabilities of the whole vocabulary at every position: score mode and stock vLLM.

    python benchmarks/full_vocabulary.py                    # Qwen3-0.6B shape on a GPU
    python benchmarks/full_vocabulary.py --shape llama-60m --length 256   # on a CPU

Stock vLLM (`prompt_logprobs=-1`, a dict with an object for every token) gets the first tokens of
the prompt only: at 150,000 tokens it needs about a second a position.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
import shapes
from engines import SCORE
from harness import Contender, interleave, report

STOCK = "stock prompt_logprobs=-1"
TARGET = 1000.0


def main() -> None:
    options = arguments()
    engines.prepare(options)
    config = shapes.configuration(options)
    llm = engines.open_engine(shapes.folder_of(config), options.length, options)
    prompts = engines.random_prompts(1, options.length, config["vocab_size"])
    short = [prompts[0][: options.stock_length]]

    def stock(given: list[list[int]]) -> Any:
        return engines.generate(llm, given, prompt_logprobs=-1)

    contenders = [
        Contender(
            SCORE,
            lambda: engines.scores(llm, prompts, full_vocabulary=True),
            options.length,
            options.rounds,
            condense=lambda results: results[0].logprobs[: options.stock_length - 1].copy(),
        ),
        Contender(
            STOCK,
            lambda: stock(short),
            options.stock_length,
            options.stock_rounds,
            warm=lambda: stock([short[0][:3]]),
            condense=lambda outputs: whole_rows(outputs[0], config["vocab_size"]),
        ),
    ]
    results = interleave(contenders)
    difference = np.abs(results[SCORE] - results[STOCK])
    # Logits rounded to bfloat16 are up to 0.0625 off at 16 to 32, and so is the normaliser.
    if not (difference.mean() < 0.2 and difference.max() < 1.5):
        raise SystemExit(f"the log-probabilities differ: {difference.mean()}, {difference.max()}")
    whole = engines.on_gpu() and shapes.is_whole(options)
    report(
        "full_vocabulary",
        contenders,
        SCORE,
        {**vars(options), **engines.describe(llm)},
        {
            STOCK: f"from score mode, {difference.size} numbers: mean {difference.mean():.1e}, "
            f"max {difference.max():.1e} nats"
        },
        "tokens/s",
        {STOCK: (">=", TARGET)} if whole else {},
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--stock-length", type=int, default=16)
    parser.add_argument("--stock-rounds", type=int, default=1)
    options = parser.parse_args()
    if not 4 <= options.stock_length <= options.length:
        parser.error(f"--stock-length is {options.stock_length}: 4 to --length, {options.length}")
    return options


def whole_rows(output: Any, vocab_size: int) -> np.ndarray:
    """[n-1, V] from stock vLLM's dicts; NaN where a token is missing."""
    rows = np.full((len(output.prompt_logprobs) - 1, vocab_size), np.nan, dtype=np.float32)
    for row, entries in zip(rows, output.prompt_logprobs[1:], strict=True):
        row[list(entries)] = [entry.logprob for entry in entries.values()]
    return rows


if __name__ == "__main__":
    main()
