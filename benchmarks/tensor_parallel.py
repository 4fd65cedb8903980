"""How far scores move when the model is sharded over two workers, and where that comes from.

    python benchmarks/tensor_parallel.py                            # Llama-3.1-8B shape, two GPUs
    python benchmarks/tensor_parallel.py --shape llama-60m --layers 2 --prompts 2 --length 64

Each engine runs in a program of its own, with the same weights and prompts. A float64 head over
each side's own hidden states says how much of a difference is the body's (other orders of
addition, all-reduced in bfloat16) and how much the head's.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
import shapes
from harness import judge, report_values

# Nats; far more than rounding explains.
UNSOUND = 0.5


def main() -> None:
    options = arguments()
    if options.run_one:
        run_one(options)
        return
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, options.size):
            out = f"{folder}/{size}.pickle"
            command = [sys.executable, __file__, *sys.argv[1:], "--run-one", str(size)]
            environment = environment_of(size)
            done = subprocess.run([*command, "--out", out], env=environment, timeout=options.limit)
            if done.returncode:
                raise SystemExit(f"tensor_parallel_size={size} ended with {done.returncode}")
            with open(out, "rb") as file:
                sides[size] = pickle.load(file)
    one, more = sides[1], sides[options.size]
    rows = [row(name, one["found"][name], more["found"][name]) for name in one["found"]]
    for kind in ("mean", "max"):
        stock = min(float(r[f"{kind}_difference"]) for r in rows[1:])
        target = judge(("<=", stock), float(rows[0][f"{kind}_difference"]))
        rows[0][f"{kind}_target"], rows[0][f"{kind}_reached"] = target
    report_values("tensor_parallel", rows, {**vars(options), **more["about"]})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "llama-3.1-8b")
    engines.add_arguments(parser)
    parser.add_argument("--size", type=int, default=2, help="workers of the sharded engine")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for each engine")
    parser.add_argument("--run-one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser.parse_args()


def environment_of(size: int) -> dict[str, str]:
    """The environment of an engine of so many workers."""
    environment = dict(os.environ)
    # A multicast all-reduce is no part of the question, and not every machine has it.
    environment.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    if not engines.on_gpu() and size > 1:
        cores = sorted(os.sched_getaffinity(0))[:size]
        if len(cores) < size:
            raise SystemExit(f"{size} workers need {size} cores, there are {len(cores)}")
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores))
    return environment


def run_one(options: argparse.Namespace) -> None:
    """Score with an engine of `run_one` workers and write what was found."""
    options.eager = True  # the hidden states are taken from a hook
    engines.prepare(options)
    config = shapes.configuration(options)
    parallel: dict[str, Any] = {}
    if options.run_one > 1:
        parallel = {
            "tensor_parallel_size": options.run_one,
            "distributed_executor_backend": "mp",
        }
    llm = engines.open_engine(shapes.folder_of(config), options.length, options, **parallel)
    prompts = engines.random_prompts(options.prompts, options.length, config["vocab_size"])
    llm.collective_rpc("capture_hidden_states")
    found = {}
    for name, way in engines.ways_to_score(llm).items():
        values, exact, *_ = engines.with_exact(llm, way, prompts)
        found[name] = (values, exact)
    with open(options.out, "wb") as file:
        pickle.dump({"found": found, "about": engines.describe(llm)}, file)


def row(name: str, one: tuple[np.ndarray, ...], more: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """The differences of one contender between the two engines, in nats."""
    difference = np.abs(more[0] - one[0])
    body = np.abs(more[1] - one[1])
    head = np.abs((more[0] - more[1]) - (one[0] - one[1]))
    if not difference.mean() < UNSOUND:
        raise SystemExit(f"{name} differs by {difference.mean()} nats in the mean")
    kinds = {
        "difference": difference,
        "body": body,
        "head": head,
        "error_of_one": np.abs(one[0] - one[1]),
        "error_sharded": np.abs(more[0] - more[1]),
    }
    figures: dict[str, Any] = {"contender": name}
    for kind, values in kinds.items():
        figures[f"mean_{kind}"] = f"{values.mean():.3e}"
        figures[f"max_{kind}"] = f"{values.max():.3e}"
    signed = [float(v.mean()) for v in (more[0] - one[0], more[1] - one[1])]
    figures["nll_moves_by"], figures["nll_body"] = (f"{-value:.3e}" for value in signed)
    return {**figures, "unit": "nats", "tokens": difference.size}


if __name__ == "__main__":
    main()
