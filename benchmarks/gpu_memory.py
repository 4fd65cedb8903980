"""Extra peak memory of scoring one large batch over the same prefill without scores.

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --shape llama-60m --rows 1024   # tries it on a CPU

On a GPU the peak is PyTorch's, of allocated device memory; on a CPU it is the resident memory
of the process, which also counts what the allocator keeps.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import shapes
from engines import BARE, SCORE, STOCK_IDS, STOCK_OWN, STOCK_TOP
from harness import agreement, judge, report_values

HF_BARE, HF = "Hugging Face, bare forward pass", "Hugging Face"
MIB = 1 << 20
LIMIT_MIB = 128.0
STATISTICS = ("entropy", "rank", "argmax")


def main() -> None:
    options = arguments()
    engines.prepare(options)
    gpu = engines.on_gpu()
    config = shapes.configuration(options)
    folder = shapes.folder_of(config)
    length = options.rows // options.prompts + 1
    # The whole batch in one step: score mode sends n-1 tokens per prompt, stock vLLM n.
    options.batched_tokens = options.prompts * length
    llm = engines.open_engine(folder, length, options)
    prompts = engines.random_prompts(options.prompts, length, config["vocab_size"])
    peak = device_peak if gpu else resident_peak

    values: dict[str, Any] = {}
    peaks: dict[str, list[int]] = {}

    def measure(name: str, run: Callable[[], Any], condense: Callable[[Any], Any] | None) -> None:
        gc.collect()
        used, result = peak(run)
        peaks.setdefault(name, []).append(used)
        if condense is not None:
            values[name] = condense(result)

    ways: list[tuple[str, Callable[[], Any], Callable[[Any], Any] | None]] = [
        (BARE, lambda: engines.generate(llm, prompts), None),
        (SCORE, lambda: engines.scores(llm, prompts), engines.score_values),
        (
            "score mode, entropy rank argmax",
            lambda: engines.scores(llm, prompts, statistics=STATISTICS),
            engines.score_values,
        ),
        (
            STOCK_TOP,
            lambda: engines.generate(llm, prompts, prompt_logprobs=1),
            engines.own_logprobs,
        ),
        (
            STOCK_OWN,
            lambda: engines.generate(llm, prompts, prompt_logprobs=0),
            engines.own_logprobs,
        ),
    ]
    if engines.serves_token_ids(llm):
        ways.append(
            (
                STOCK_IDS,
                lambda: engines.generate_token_ids(llm, prompts),
                engines.token_id_values,
            )
        )
    else:
        print(f"# {STOCK_IDS}: only the V2 model runner serves it, left out")
    for _ in range(1 + options.rounds):  # the first one warms up and is dropped
        for way in ways:
            measure(*way)

    from random_weights import hugging_face_model

    hf = hugging_face_model(folder, "cuda" if gpu else "cpu")
    batch = options.prompts
    for _ in range(1 + options.rounds):
        measure(HF_BARE, lambda: body(hf, prompts), None)
        for softmax in ("bfloat16", "float32"):
            measure(
                f"{HF}, {softmax} softmax",
                lambda softmax=softmax: engines.hugging_face(hf, prompts, batch, softmax),
                lambda result: result,
            )
    differences = agreement(values, SCORE, mean_limit=0.3)
    rows = []
    for name, used in peaks.items():
        most = max(used[1:])
        bare = peaks[HF_BARE if name.startswith(HF) else BARE][1:]
        extra = (most - max(bare)) / MIB
        target = ("<=", LIMIT_MIB) if gpu and name.startswith(SCORE) else None
        wanted, reached = judge(target, extra)
        rows.append(
            {
                "contender": name,
                "extra_over_bare": round(extra, 1),
                "peak_over_idle": round(most / MIB, 1),
                "unit": "MiB",
                "target": wanted,
                "reached": reached,
                "difference": differences.get(name, ""),
            }
        )
    report_values("gpu_memory", rows, {**vars(options), **engines.describe(llm)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8192, help="scored rows of the one batch")
    parser.set_defaults(rounds=2)
    return parser.parse_args()


def body(hf: Any, prompts: list[list[int]]) -> None:
    """Hugging Face's forward pass without the head."""
    import torch

    ids = torch.tensor(prompts, device=next(hf.parameters()).device)
    with torch.inference_mode():
        hf.model(ids[:, :-1], use_cache=False)


def device_peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes allocated on the device at the peak of a run, less those before it."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def resident_peak(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes of resident memory at the peak of a run, less those before it."""

    def status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
        raise SystemExit(f"/proc/self/status has no {field}")

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    result = run()
    return status("VmHWM") - before, result


if __name__ == "__main__":
    main()
