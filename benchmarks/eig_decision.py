"""One decision by expected information gain: the engine against Hugging Face; and 32 at once.

    python benchmarks/eig_decision.py --shape qwen3-0.6b
    python benchmarks/eig_decision.py --shape llama-60m --part one --context-length 240 \
        --sample-length 16                                                        # on a CPU
    python benchmarks/eig_decision.py --shape llama-60m --part many --layers 2 \
        --context-length 240 --sample-length 16                                   # on a CPU

A decision scores 8 answers of 4 tokens after a random context, samples 5 continuations, and scores
the answers after each. "Hugging Face, one by one" calls `generate` for each continuation, which
keeps its usual cache within the call, and runs a forward pass over context and answer for each of
the 48 scores, without a cache. "Hugging Face, in batches" draws all continuations in one call and
scores the answers of a state in one batch. All have the same weights, with flatter logits than the
other benchmarks', which would often repeat one token. There is no end-of-sequence token, and every
continuation has the full length. Draws differ, so that the engine's own continuations are scored by
Hugging Face once more, outside the clock, and the entropies compared.

Then as many decisions as --concurrency, with a context each, through the driver, against the same
work in bulk: one `generate` call for all continuations and one `score` call for all answers before
and after them. The prefix cache is emptied before every round of either.
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
from eig_engine import CUE, Decisions
from eig_hugging_face import Forecasts, HuggingFaceDecisions
from harness import Contender, agreement, interleave, report

ENGINE = "EngineDriver"
PLAIN = "Hugging Face, one by one"
KIND = "Hugging Face, in batches"
BULK = "generate and score, in bulk"
# Largest mean difference of log-posteriors and of entropies, in nats.
LIMITS = {"float32": (1e-3, 1e-3), "bfloat16": (0.3, 0.1)}


def main() -> None:
    options = arguments()
    engines.prepare(options)
    gpu = engines.on_gpu()
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    config = {**shapes.configuration(options), "eos_token_id": None}
    folder = shapes.folder_of(config)
    length = len(CUE) + options.context_length + options.sample_length + options.answer_length
    import random_weights

    random_weights.LOGIT_STD = options.logit_std
    more: dict[str, Any] = {"dtype": options.dtype}
    if not gpu:
        more.update(
            block_size=options.cpu_block,
            kv_cache_memory_bytes=options.cache_mib << 20,
            distributed_executor_backend="uni",
        )
    llm = engines.open_engine(folder, length, options, **more)
    work = Decisions(llm, options, config["vocab_size"])
    sizes = {**vars(options), **engines.describe(llm)}
    if options.part != "many":
        one_decision(folder, work, options, sizes)
    if options.part != "one":
        side_by_side(work, options, sizes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes.add_arguments(parser, "qwen3-0.6b")
    engines.add_arguments(parser)
    parser.add_argument("--dtype", choices=sorted(LIMITS), help="bfloat16, on a CPU float32")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--beam-size", type=int, default=8, help="answers")
    parser.add_argument("--answer-length", type=int, default=4, help="tokens, with the end")
    parser.add_argument("--mc-samples", type=int, default=5)
    parser.add_argument("--sample-length", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--logit-std", type=float, default=1.5, help="flat enough for many draws")
    parser.add_argument("--slow-rounds", type=int, help="of Hugging Face; by default --rounds")
    parser.add_argument("--concurrency", type=int, default=32, help="decisions at once")
    parser.add_argument("--part", choices=("one", "many", "both"), default="both")
    parser.add_argument("--cpu-block", type=int, default=32, help="tokens a cache block, on a CPU")
    parser.add_argument("--cache-mib", type=int, default=1024, help="KV cache, on a CPU")
    return parser.parse_args()


def one_decision(
    folder: str, work: Decisions, options: argparse.Namespace, sizes: dict[str, Any]
) -> None:
    """Time one decision, and compare its entropies."""
    import torch
    from random_weights import hugging_face_model

    hf = hugging_face_model(folder, "cuda" if engines.on_gpu() else "cpu")
    hf.to(getattr(torch, options.dtype))
    sampling = {
        "max_new_tokens": options.sample_length,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": 0,
    }
    ways = {
        PLAIN: HuggingFaceDecisions(hf, work.cue, work.answers, sampling, together=False),
        KIND: HuggingFaceDecisions(hf, work.cue, work.answers, sampling, together=True),
    }
    context, draws = work.states[0], options.mc_samples
    contenders = [Contender(ENGINE, work.one, 1, options.rounds, condense=work.checked)]
    for name, way in ways.items():
        contenders.append(
            Contender(
                name,
                lambda way=way: way.decide(context, draws),
                1,
                options.slow_rounds or options.rounds,
                warm=lambda way=way: way.decide(context, 1),
            )
        )
    results = interleave(contenders)
    (decision,) = results[ENGINE]
    found = of_decision(decision)
    continuations = [c.token_ids for c in decision.forecast.continuations]
    states = [context, *([*context, *ids] for ids in continuations)]
    limits = LIMITS[options.dtype]
    spent = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in decision.seconds.items())
    differences = {ENGINE: f"{entropies(found)}; last round: {spent}"}
    same_states = ways[PLAIN].forecasts(states)
    for name in ways:
        now = Forecasts(results[name].log_posteriors[:1], results[name].entropies[:1])
        differences[name] = f"{entropies(results[name])}; {compared(name, now, found, limits)}"
    differences[PLAIN] += f"; {compared(PLAIN, same_states, found, limits)}"
    wanted = 10.0 if engines.on_gpu() else 5.0
    targets = {PLAIN: (">=", wanted)} if shapes.is_whole(options) else {}
    sizes = {**sizes, "hf_threads": torch.get_num_threads(), "attention": "sdpa"}
    sizes["equal_draws"] = work.equal_draws
    report("eig_decision", contenders, ENGINE, sizes, differences, "decisions/s", targets)


def side_by_side(work: Decisions, options: argparse.Namespace, sizes: dict[str, Any]) -> None:
    """Time many decisions at once against the same work in bulk."""
    count, first = options.concurrency, options.concurrency * options.beam_size

    def of_bulk(result: tuple[list[Any], list[list[list[int]]]]) -> np.ndarray:
        scored, drawn = result
        for group in drawn:
            work.check_draws(group)
        return np.array([r.logprobs.sum(dtype=np.float64) for r in scored[:first]])

    def of_driver(decisions: list[Any]) -> np.ndarray:
        return np.concatenate([d.posterior.logprobs for d in work.checked(decisions)])

    contenders = [
        Contender(ENGINE, work.all, count, options.rounds, condense=of_driver),
        Contender(BULK, work.bulk, count, options.rounds, condense=of_bulk),
    ]
    work.equal_draws = 0
    results = interleave(contenders)
    limit, _ = LIMITS[options.dtype]
    differences = agreement(results, BULK, mean_limit=limit * options.answer_length)
    sizes = {**sizes, "equal_draws": work.equal_draws}
    report(
        "eig_decision_concurrency",
        contenders,
        ENGINE,
        sizes,
        differences,
        "decisions/s",
        {BULK: (">=", 0.8)},
    )


def of_decision(decision: Any) -> Forecasts:
    """The engine's decision in the form of the others'."""
    posterior, forecast = decision.posterior, decision.forecast
    return Forecasts(
        np.concatenate([posterior.log_posterior[None], forecast.log_posteriors]),
        np.concatenate([[posterior.entropy], forecast.entropies]),
    )


def entropies(found: Forecasts) -> str:
    """In words, of a contender's own draws."""
    now, *later = found.entropies
    return f"H_t {now:.5f}, mean H_t+1 of its own draws {np.mean(later):.5f} nats"


def compared(name: str, found: Forecasts, engine: Forecasts, limits: tuple[float, float]) -> str:
    """How far the posteriors are from the engine's at the same states, in words.

    Raises:
        SystemExit: further than the limits.
    """
    parts = []
    for what, limit in zip(("log_posteriors", "entropies"), limits, strict=True):
        ours = getattr(engine, what)[: len(found.entropies)]
        difference = np.abs(getattr(found, what) - ours)
        words = what.replace("_", "-")
        parts.append(f"{words}: mean {difference.mean():.1e}, max {difference.max():.1e} nats")
        if not difference.mean() <= limit:
            raise SystemExit(f"{name} does not give the engine's numbers: {parts[-1]}")
    return f"from {ENGINE} at {len(found.entropies)} of its states, {'; '.join(parts)}"


if __name__ == "__main__":
    main()
