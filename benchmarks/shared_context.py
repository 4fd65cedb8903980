"""What 64 continuations of one context cost, in units of one: a reasoning step's candidates.

    python benchmarks/shared_context.py --shape qwen3-0.6b
    python benchmarks/shared_context.py --shape llama-60m        # on a CPU

The prefix cache is emptied before every round, and the context is another one each time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
import shapes
from harness import Contender, agreement, interleave, report

ONE = "one continuation"
TARGET = 3.0


def main() -> None:
    options = arguments()
    engines.prepare(options)
    config = shapes.configuration(options)
    folder = shapes.folder_of(config)
    more: dict[str, Any] = {} if engines.on_gpu() else {"block_size": options.cpu_block}
    llm = engines.open_engine(folder, options.context + options.tokens, options, **more)
    many = f"{options.continuations} continuations"
    seeds = {name: itertools.count() for name in (ONE, many, "without")}

    def run(name: str, count: int, **kwargs: Any) -> Any:
        from vllm.score import score

        requests = make(options, config["vocab_size"], next(seeds[name]))[:count]
        llm.reset_prefix_cache()
        return score(llm, requests, use_tqdm=False, **kwargs)

    def values(results: Any) -> np.ndarray:
        return np.array([r.logprobs for r in results])

    contenders = [
        Contender(ONE, lambda: run(ONE, 1), 1, options.rounds, condense=values),
        Contender(
            many,
            lambda: run(many, options.continuations),
            options.continuations,
            options.rounds,
            condense=values,
        ),
    ]
    if not options.no_cache_off:
        contenders.append(
            Contender(
                f"{many}, cache off",
                lambda: run("without", options.continuations, skip_prefix_cache=True),
                options.continuations,
                options.rounds,
                condense=values,
            )
        )
    results = interleave(contenders)
    everything = {name: found for name, found in results.items() if name != ONE}
    differences = agreement(everything, many, mean_limit=0.3)
    difference = float(np.abs(results[ONE] - results[many][:1]).max())
    differences[ONE] = f"from the first of {many}: max {difference:.1e} nats"
    sizes = {**vars(options), **engines.describe(llm), **more}
    report("shared_context", contenders, many, sizes, differences, "continuations/s")
    ratio = contenders[1].median / contenders[0].median
    verdict = "yes" if ratio < TARGET else "no"
    print(f"{many} cost {ratio:.2f} times one; asked: under {TARGET:g}: {verdict}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "llama-60m")
    engines.add_arguments(parser)
    parser.set_defaults(rounds=7)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--continuations", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8, help="of each continuation")
    parser.add_argument("--cpu-block", type=int, default=32, help="tokens a cache block, on a CPU")
    parser.add_argument("--no-cache-off", action="store_true", help="only with the prefix cache")
    parser.add_argument("--multiprocess", action="store_true", help="the engine in its own process")
    return parser.parse_args()


def make(options: argparse.Namespace, vocab_size: int, seed: int) -> list[dict[str, Any]]:
    """Continuations of one random context."""
    generator = np.random.default_rng(seed)
    context = generator.integers(2, vocab_size, options.context).tolist()
    tails = generator.integers(2, vocab_size, (options.continuations, options.tokens)).tolist()
    return [{"prompt_token_ids": context + t, "target_token_ids": t} for t in tails]


if __name__ == "__main__":
    main()
