"""Error of the scores of a bfloat16 model against a float64 head over the same hidden states.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --shape llama-60m --prompts 2 --length 64   # tries it on a CPU

The hidden states are those of the very forward pass that was scored, so the body's own rounding
does not count. Logits have a standard deviation of 3 and tails up to about 30.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
import shapes
from engines import SCORE
from harness import judge, report_values

AT_LEAST_SMALLER = 50.0
# Nats; more than rounding to bfloat16 explains.
UNSOUND = 0.25


def main() -> None:
    options = arguments()
    options.eager = True  # the hidden states are taken from a hook
    engines.prepare(options)
    config = shapes.configuration(options)
    llm = engines.open_engine(shapes.folder_of(config), options.length, options)
    prompts = engines.random_prompts(options.prompts, options.length, config["vocab_size"])
    llm.collective_rpc("capture_hidden_states")
    errors = {}
    for name, way in engines.ways_to_score(llm).items():
        values, exact, deviation, largest = engines.with_exact(llm, way, prompts)
        errors[name] = np.abs(values - exact)
        if not errors[name].mean() < UNSOUND:
            raise SystemExit(f"{name} is off by {errors[name].mean()} nats in the mean")
    rows = []
    for name, error in errors.items():
        smaller = error.mean() / errors[SCORE].mean(), error.max() / errors[SCORE].max()
        target = None
        if engines.on_gpu() and shapes.is_whole(options) and name != SCORE:
            target = (">=", AT_LEAST_SMALLER)
        wanted, reached = judge(target, min(smaller))
        rows.append(
            {
                "contender": name,
                "mean_error": f"{error.mean():.3e}",
                "max_error": f"{error.max():.3e}",
                "p99_error": f"{np.quantile(error, 0.99):.3e}",
                "unit": "nats",
                "mean_over_score_mode": round(smaller[0], 1),
                "max_over_score_mode": round(smaller[1], 1),
                "target": wanted,
                "reached": reached,
                "logit_std": round(deviation, 2),
                "logit_max": round(largest, 1),
                "tokens": error.size,
            }
        )
    report_values("accuracy", rows, {**vars(options), **engines.describe(llm)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
