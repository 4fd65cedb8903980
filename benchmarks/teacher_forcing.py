"""Teacher forcing of sampled responses with all diagnostics: the engine against Hugging Face.

    python benchmarks/teacher_forcing.py --shape qwen3-0.6b
    python benchmarks/teacher_forcing.py --shape llama-60m --prompts 4 --prompt-length 64 \
        --response-length 64                                              # on a CPU

"Hugging Face, plainly" pads a batch, takes float32 copies of its logits and computes every quantity
from them, as code without an engine does. "SequenceProcessor on Hugging Face" is ours on the same
model, in blocks of rows. All have the same bfloat16 weights, and are asked for the log-probability
under the model and under the policy, the entropy, and eight diagnostics of every token.

Peak memory is what a run allocates at most, and the weights (and the engine's cache) it needs.
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
import gpu_memory
import numpy as np
import shapes
from harness import Contender, agreement, interleave, judge, report, report_values

ENGINE = "SequenceProcessor on the engine"
OURS = "SequenceProcessor on Hugging Face"
PLAIN = "Hugging Face, plainly"
MIB = 1 << 20


def main() -> None:
    options = arguments()
    engines.prepare(options)
    gpu = engines.on_gpu()
    config = shapes.configuration(options)
    folder = shapes.folder_of(config)
    length = options.prompt_length + options.response_length
    cache = options.cache_mib * MIB
    llm = engines.open_engine(folder, length, options, kv_cache_memory_bytes=cache)

    import torch
    from random_weights import hugging_face_model
    from transformers import AutoTokenizer

    from vllm.score.processor import SequenceProcessor

    hf = hugging_face_model(folder, "cuda" if gpu else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {
        "generation": {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "tf_batch_size": options.hf_batch,
        },
        "precision": {"tf_nograd": {"dtype": "bfloat16"}},
    }
    batch = make(options, config["vocab_size"])
    fast = SequenceProcessor(None, tokenizer, config=settings, llm=llm)
    ours = SequenceProcessor(hf, tokenizer, config=settings)

    def processed(processor: Any) -> Callable[[], Any]:
        def run() -> Any:
            llm.reset_prefix_cache()
            return processor.teacher_force_logprobs_with_diagnostics(batch, compute_rb=True)

        return run

    work = options.prompts * options.responses * options.response_length
    ways = {
        ENGINE: processed(fast),
        OURS: processed(ours),
        PLAIN: lambda: plainly(hf, batch, fast.config),
    }
    contenders = [
        Contender(
            name,
            run,
            work,
            options.rounds,
            condense=None if name == PLAIN else lambda result: columns(*result),
        )
        for name, run in ways.items()
    ]
    results = interleave(contenders)
    differences = agreement(
        {name: values["logprob"] for name, values in results.items()}, ENGINE, mean_limit=0.3
    )
    for name in results:
        means = mean_difference(results[name], results[ENGINE])
        differences[name] += f"; largest difference of a mean: {means}"
    sizes = {**vars(options), **engines.describe(llm)}
    report("teacher_forcing", contenders, ENGINE, sizes, differences, "tokens/s", targets(options))

    weights = sum(p.numel() * p.element_size() for p in set(hf.parameters()))
    peak = gpu_memory.device_peak if gpu else gpu_memory.resident_peak
    rows = []
    for name, run in ways.items():
        gc.collect()
        used, _ = peak(run)
        kept = weights + (cache if name == ENGINE else 0)
        rows.append({"contender": name, "run_mib": round(used / MIB), "all": (used + kept) / MIB})
    ours_mib = rows[0]["all"]
    for row in rows:
        ratio = row["all"] / ours_mib
        wanted, reached = judge((">=", 4.0) if gpu and row["contender"] == PLAIN else None, ratio)
        row.update(all=round(row["all"]), over_engine=round(ratio, 2), unit="MiB")
        row.update(target=wanted, reached=reached)
    report_values("teacher_forcing_memory", rows, sizes)
    if gpu:
        torch.cuda.empty_cache()


def targets(options: argparse.Namespace) -> dict[str, tuple[str, float]]:
    """What was asked of the 0.6B shape on a GPU."""
    if not engines.on_gpu() or options.shape != "qwen3-0.6b":
        return {}
    return {PLAIN: (">=", 2.0), OURS: (">=", 2.0)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--response-length", type=int, default=256, help="the longest")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--hf-batch", type=int, default=8, help="the processor's default")
    parser.add_argument("--cache-mib", type=int, default=1536, help="the engine's KV cache")
    return parser.parse_args()


def make(options: argparse.Namespace, vocab_size: int) -> Any:
    """Random prompts, and responses of random tokens and one length."""
    from vllm.score.processor.sequences import pad_batch

    rng = np.random.default_rng(0)
    prompts = rng.integers(2, vocab_size, (options.prompts, options.prompt_length))
    shape = (options.prompts, options.responses, options.response_length)
    responses = rng.integers(2, vocab_size, shape)
    return pad_batch(prompts.tolist(), responses.tolist(), 0, lambda ids: "")


def columns(scores: Any, diagnostics: Any) -> dict[str, np.ndarray]:
    """The values of all tokens, one after another, by name."""
    packs = [pack.step for group in diagnostics.diagnostics for pack in group]
    found = {
        "logprob": np.concatenate([t.numpy() for group in scores.logprobs for t in group]),
        "logq": np.concatenate([t.numpy() for group in scores.token_logqs for t in group]),
    }
    for name in NAMES:
        found[name] = np.concatenate([getattr(pack, name) for pack in packs])
    return found


NAMES = (
    "rb_entropy",
    "head_mass",
    "top1_prob",
    "margin",
    "collision",
    "logit_mean",
    "logit_var",
    "eos_prob",
)


def mean_difference(found: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> str:
    """The quantity whose mean is furthest from the reference's, in words."""
    worst = {name: abs(float(found[name].mean() - reference[name].mean())) for name in NAMES}
    name = max(worst, key=lambda n: worst[n])
    return f"{name} {worst[name]:.1e}"


def plainly(hf: Any, batch: Any, config: Any) -> dict[str, np.ndarray]:
    """Every quantity from float32 copies of a batch's logits."""
    import torch

    flat = batch.sequences.flatten(0, 1)
    begin = batch.prompt_lens[0]
    device = next(hf.parameters()).device
    eos = hf.config.eos_token_id
    parts = []
    with torch.inference_mode():
        for rows in flat.split(config.tf_batch_size):
            ids = rows.to(device)
            logits = hf(ids, use_cache=False).logits[:, begin - 1 : -1].float()
            targets = ids[:, begin:, None]
            logprob = logits.log_softmax(-1).gather(-1, targets)[..., 0]
            a = logits / config.temperature
            p = a.softmax(-1)
            q, mass = p, torch.ones_like(logprob)
            if config.top_p < 1:
                ordered, places = p.sort(-1, descending=True)
                kept = ordered.cumsum(-1) - ordered < config.top_p
                q = p * torch.zeros_like(p).scatter(-1, places, kept.float())
                mass = q.sum(-1)
                q = q / mass[..., None]
            entropy = -torch.special.xlogy(q, q).sum(-1)
            first, second = a.topk(2, -1).values.unbind(-1)
            mean = (q * a).sum(-1)
            parts.append(
                {
                    "logprob": logprob,
                    "logq": q.gather(-1, targets)[..., 0].log(),
                    "rb_entropy": entropy,
                    "head_mass": mass,
                    "top1_prob": q.amax(-1),
                    "margin": first - second,
                    "collision": (q * q).sum(-1),
                    "logit_mean": mean,
                    "logit_var": (q * (a - mean[..., None]) ** 2).sum(-1),
                    "eos_prob": q[..., eos],
                }
            )
            parts[-1] = {name: t.flatten().cpu().numpy() for name, t in parts[-1].items()}
            del logits, a, p, q
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    main()
