"""Scores of a batch of long prompts against the floor of the hardware, stock vLLM, Hugging Face.

    python benchmarks/gpu_bulk.py --shape qwen3-0.6b --prompts 64
    python benchmarks/gpu_bulk.py --shape llama-3.1-8b --prompts 32
    python benchmarks/gpu_bulk.py --shape llama-60m --prompts 4 --length 64  # tries it on a CPU

The floor is the same engine's prefill without scores plus the product of all hidden states and
the LM head (bfloat16 output, in the fastest of several chunk sizes), timed alone. Engine and
Hugging Face have the same weights.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import shapes
from engines import BARE, SCORE, STOCK_IDS, STOCK_TOP
from harness import Contender, agreement, interleave, report

WITH_STATISTICS = "score mode, entropy rank argmax"
HEAD = "LM-head product alone"
FLOOR = "floor: bare prefill + LM head"
STATISTICS = ("entropy", "rank", "argmax")
CHUNKS = (1024, 2048, 4096, 8192)
TARGETS = {
    "qwen3-0.6b": {
        FLOOR: (">=", 0.95),
        STOCK_TOP: (">=", 7.5),
        STOCK_IDS: (">=", 1.05),
        "Hugging Face": (">=", 2.2),
        WITH_STATISTICS: ("<=", 1.05),
    },
    "llama-3.1-8b": {
        FLOOR: (">=", 0.97),
        STOCK_TOP: (">=", 1.10),
        "Hugging Face": (">=", 1.2),
        WITH_STATISTICS: ("<=", 1.05),
    },
}


def main() -> None:
    options = arguments()
    engines.prepare(options)
    gpu = engines.on_gpu()
    config = shapes.configuration(options)
    folder = shapes.folder_of(config)
    llm = engines.open_engine(folder, options.length, options)
    prompts = engines.random_prompts(options.prompts, options.length, config["vocab_size"])

    from random_weights import hugging_face_model

    hf = None if options.no_hf else hugging_face_model(folder, "cuda" if gpu else "cpu")
    product, chunk = head_product(config, options, "cuda" if gpu else "cpu")
    contenders = ways(llm, hf, product, prompts, options)
    results = interleave(contenders)
    by_name = {c.name: c for c in contenders}
    # Two bfloat16 models differ by hundredths in a token and hardly in the mean.
    found = {name: values for name, values in results.items() if name not in (BARE, HEAD)}
    differences = agreement(found, SCORE, mean_limit=0.3)
    if options.profile:
        for name in (BARE, SCORE):
            profile(name, by_name[name].run)
            if gpu and not options.multiprocess:
                profile_device(name, by_name[name].run)
    floor = Contender(FLOOR, lambda: None, options.prompts * options.length, rounds=options.rounds)
    floor.seconds = [
        a + b for a, b in zip(by_name[BARE].seconds, by_name[HEAD].seconds, strict=True)
    ]
    targets = {}
    if gpu and shapes.is_whole(options):
        wanted = TARGETS.get(options.shape, {})
        targets = {c.name: wanted.get(c.name.split(",")[0]) for c in contenders}
        targets.update({FLOOR: wanted.get(FLOOR), WITH_STATISTICS: wanted.get(WITH_STATISTICS)})
    report(
        "gpu_bulk",
        [*contenders, floor],
        SCORE,
        {**vars(options), **engines.describe(llm), "head_chunk_rows": chunk},
        differences,
        "tokens/s",
        {name: target for name, target in targets.items() if target},
    )
    lost = by_name[SCORE].median - floor.median
    print(
        f"score mode is at {floor.median / by_name[SCORE].median:.3f} of the floor's speed: "
        f"{1e6 * lost / options.prompts:.0f} us per request, "
        f"{1e9 * lost / options.prompts / options.length:.0f} ns per token more"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--hf-batch", type=int, default=4)
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--multiprocess", action="store_true", help="the engine in its own process")
    parser.add_argument(
        "--profile", action="store_true", help="where the time of a bare and a scoring run goes"
    )
    return parser.parse_args()


def ways(llm: Any, hf: Any, product: Any, prompts: Any, options: argparse.Namespace) -> Any:
    """The contenders."""
    work = options.prompts * options.length

    def contender(name: str, run: Any, condense: Any = None) -> Contender:
        return Contender(name, run, work, options.rounds, condense=condense)

    found = [
        contender(SCORE, lambda: engines.scores(llm, prompts), engines.score_values),
        contender(BARE, lambda: engines.generate(llm, prompts), lambda outputs: None),
        contender(HEAD, product),
        contender(
            WITH_STATISTICS,
            lambda: engines.scores(llm, prompts, statistics=STATISTICS),
            engines.score_values,
        ),
        contender(
            STOCK_TOP,
            lambda: engines.generate(llm, prompts, prompt_logprobs=1),
            engines.own_logprobs,
        ),
    ]
    if engines.serves_token_ids(llm):
        found.append(
            contender(
                STOCK_IDS,
                lambda: engines.generate_token_ids(llm, prompts),
                engines.token_id_values,
            )
        )
    else:
        print(f"# {STOCK_IDS}: only the V2 model runner serves it, left out")
    if hf is not None:
        for softmax in ("bfloat16", "float32"):
            run = functools.partial(
                engines.hugging_face, hf, prompts, options.hf_batch, softmax=softmax
            )
            found.append(contender(f"Hugging Face, {softmax} softmax", run))
    return found


def head_product(config: dict[str, Any], options: argparse.Namespace, device: str) -> Any:
    """The bare product of all rows and the head, and the chunk size in which it is fastest."""
    import time

    import torch

    rows = options.prompts * (options.length - 1)
    hidden = torch.randn(
        min(rows, max(CHUNKS)), config["hidden_size"], dtype=torch.bfloat16, device=device
    )
    weight = torch.randn(
        config["vocab_size"], config["hidden_size"], dtype=torch.bfloat16, device=device
    )
    out = torch.empty(len(hidden), config["vocab_size"], dtype=torch.bfloat16, device=device)

    def run(chunk: int) -> None:
        for first in range(0, rows, chunk):
            count = min(chunk, rows - first)
            begin = first % len(hidden) if len(hidden) == max(CHUNKS) else first
            torch.mm(hidden[begin : begin + count], weight.t(), out=out[:count])
        if device == "cuda":
            torch.cuda.synchronize()

    def seconds(chunk: int) -> float:
        run(chunk)
        begin = time.perf_counter()
        run(chunk)
        return time.perf_counter() - begin

    best = min((c for c in CHUNKS if c <= len(hidden) or c == CHUNKS[0]), key=seconds)
    return functools.partial(run, best), best


def profile(name: str, run: Any) -> None:
    """Print the functions in which one run's host time goes."""
    import cProfile
    import pstats

    profiler = cProfile.Profile()
    profiler.runcall(run)
    print(f"host time of one run, {name}:")
    pstats.Stats(profiler, stream=sys.stdout).strip_dirs().sort_stats("tottime").print_stats(25)


def profile_device(name: str, run: Any) -> None:
    """Print the kernels in which one run's device time goes, and the share that the GPU is busy."""
    import time

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        run()
        wall = time.perf_counter() - begin
    table = sorted(profiler.key_averages(), key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in table) / 1e6
    print(f"device time of one run, {name}: busy {busy:.3f} s of {wall:.3f} s")
    for event in table[:20]:
        print(f"{event.self_device_time_total / 1e3:10.2f} ms {event.count:6d} {event.key[:100]}")


if __name__ == "__main__":
    main()
