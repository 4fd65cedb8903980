"""When to stop reasoning: expected information gain and its rivals, accuracy against tokens.

    python benchmarks/stopping_rules.py
    python benchmarks/stopping_rules.py --problems 60      # 10 minutes on two cores

The task is chained additions with running sums as reasoning, which the model of
`vllm.score.tiny.additions` has learned in under a minute. Every rule runs over a range of its
setting, on the same problems and the same engine:

* EIG: one more step as long as it pays lambda; K forecasts per decision. A step is one sum, or
  three: the rule looks a step ahead, and one sum of many tells little by itself.
* entropy threshold: as long as H_t is above it; no forecasts.
* fixed budget: so many sums for every problem.
* majority vote: m whole reasonings, the most frequent answer.

Tokens are counted twice: those of the reasoning that an answer rests on, and all that were drawn
for it, forecasts included. A rule at a number of tokens that none of its settings has is the
mixture of the two nearest; accuracies at equal tokens come with intervals of a bootstrap over the
problems.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import engines
import numpy as np
from harness import RESULTS, report_values

EIG, FAR = "EIG, a sum a step", "EIG, three sums a step"
THRESHOLD, BUDGET, VOTE = "entropy threshold", "fixed budget", "majority vote"
OURS = {EIG: 1, FAR: 3}
COSTS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0)
THRESHOLDS = (2.5, 2.0, 1.5, 1.0, 0.7, 0.4, 0.2, 0.1)
BUDGETS = (0, 1, 2, 3, 4, 5, 6, 7)
VOTES = (1, 3, 5, 9)
LONGEST = 12  # sums; no problem has more than 7
DRAWS = 2000
ROOM = 64  # tokens for the question, the cue and an answer


@dataclass
class Point:
    """One rule at one setting, over all problems.

    Attributes:
        correct: bool [n].
        reasoning, drawn: tokens, int [n].
    """

    rule: str
    setting: float
    correct: np.ndarray
    reasoning: np.ndarray
    drawn: np.ndarray
    seconds: float


def main() -> None:
    options = arguments()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    engines.prepare(options)
    from vllm.score.tiny.additions import additions_model, random_problems

    model = additions_model()
    llm = open_llm(str(model.directory))
    problems = random_problems(options.problems, seed=options.seed)
    points = measure(llm, problems, options)
    sizes = {
        **vars(options),
        "model": {k: model.facts[k] for k in ("parameters", "training_steps")},
        **engines.describe(llm),
    }
    rows = [row(point) for point in points]
    report_values("stopping_rules", rows, sizes)
    report_values("stopping_rules_equal_tokens", compare(points), sizes)
    RESULTS.mkdir(parents=True, exist_ok=True)
    draw(rows, RESULTS / "stopping_rules.png")


def open_llm(folder: str) -> Any:
    """A float32 engine for short texts."""
    from vllm import LLM

    settings: dict[str, Any] = {"gpu_memory_utilization": 0.3}
    if not engines.on_gpu():
        settings = {"kv_cache_memory_bytes": 256 << 20, "distributed_executor_backend": "uni"}
    return LLM(
        folder, dtype="float32", max_model_len=128, enforce_eager=True, use_tqdm_on_load=False,
        **settings,
    )  # fmt: skip


def measure(llm: Any, problems: Sequence[Any], options: argparse.Namespace) -> list[Point]:
    """Every rule at every setting."""
    from vllm.score.eig import (
        EIGMetrics,
        entropy_threshold_reasoning,
        expected_information_gain_reasoning,
        fixed_budget_reasoning,
    )
    from vllm.score.tiny.additions import CUE, END

    questions = [problem.question for problem in problems]
    gold = [problem.answer for problem in problems]
    common: dict[str, Any] = {
        "answer_cue": CUE,
        "answer_end": END,
        "beam_size": options.beam_size,
        "sample_length": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "thinking_n_ignore": 0,
        "max_tokens_thinking": LONGEST,
        "metrics": EIGMetrics(),
        "use_tqdm": False,
        "concurrency": options.concurrency,
    }
    points = []

    def add(rule: str, setting: float, run: Any) -> None:
        begin = time.perf_counter()
        traces = run()
        points.append(
            Point(
                rule,
                setting,
                np.array([t.answer == answer for t, answer in zip(traces, gold, strict=True)]),
                np.array([len(t.reasoning_token_ids) for t in traces]),
                np.array([t.tokens_sampled for t in traces]),
                time.perf_counter() - begin,
            )
        )
        failed = sum(t.steps[-1].decision.failure is not None for t in traces)
        if failed:
            raise SystemExit(f"{rule} at {setting}: {failed} decisions failed")
        print(f"# {row(points[-1])}", file=sys.stderr, flush=True)

    for (rule, sums), cost in itertools.product(OURS.items(), COSTS):
        settings = {"mc_samples": options.mc_samples, **common, "sample_length": sums}
        add(
            rule,
            cost,
            lambda cost=cost, settings=settings: expected_information_gain_reasoning(
                llm, questions, lambda_cost=cost, **settings
            ),
        )
    for threshold in THRESHOLDS:
        add(
            THRESHOLD,
            threshold,
            lambda threshold=threshold: entropy_threshold_reasoning(
                llm, questions, entropy_threshold=threshold, **common
            ),
        )
    bounded = {name: value for name, value in common.items() if name != "max_tokens_thinking"}
    for budget in BUDGETS:
        add(
            BUDGET,
            budget,
            lambda budget=budget: fixed_budget_reasoning(
                llm, questions, fixed_budget=budget, **bounded
            ),
        )
    points += votes(llm, questions, gold)
    return points


def votes(llm: Any, questions: Sequence[str], gold: Sequence[str]) -> list[Point]:
    """Majority votes; those of fewer reasonings are over the first ones of the most."""
    from vllm.score.eig import EngineDriver
    from vllm.score.eig.records import Batch, Reasoner, Sample
    from vllm.score.tiny.additions import CUE, END

    driver = EngineDriver(llm)
    cue = driver.tokenizer.encode(CUE.rstrip(" "), add_special_tokens=False)

    async def ballots(question: str, reasoner: Reasoner) -> list[tuple[int, str]]:
        """Tokens of each reasoning, and the answer behind it."""
        ids = driver.tokenizer.encode(question)
        (drawn,) = await reasoner.run(Batch([Sample(ids, max(VOTES), LONGEST)]))
        contexts = [[*ids, *one.token_ids, *cue] for one in drawn]
        short = [Sample(c, 1, 4, temperature=0.0, stop=(END,)) for c in contexts]
        answers = await reasoner.run(Batch(short))
        texts = [one.text.removesuffix(END).strip() for (one,) in answers]
        return [(len(one.token_ids), text) for one, text in zip(drawn, texts, strict=True)]

    begin = time.perf_counter()
    found = dict(driver.run_all(partial(ballots, question) for question in questions))
    seconds = time.perf_counter() - begin
    cast = [found[i] for i in range(len(questions))]
    points = []
    for count in VOTES:
        winners = [Counter(t for _, t in one[:count]).most_common(1)[0][0] for one in cast]
        lengths = np.array([[tokens for tokens, _ in one[:count]] for one in cast])
        points.append(
            Point(
                VOTE,
                count,
                np.array([w == answer for w, answer in zip(winners, gold, strict=True)]),
                lengths.sum(1),
                lengths.sum(1),
                seconds * count / max(VOTES),
            )
        )
    return points


def row(point: Point) -> dict[str, Any]:
    """A line of the table."""
    from vllm.score.eig.report import wilson_interval

    low, high = wilson_interval(int(point.correct.sum()), len(point.correct))
    n = len(point.correct)
    return {
        "rule": point.rule,
        "setting": point.setting,
        "accuracy": round(float(point.correct.mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "reasoning_tokens": round(float(point.reasoning.mean()), 3),
        "reasoning_tokens_se": round(float(point.reasoning.std(ddof=1)) / n**0.5, 3),
        "tokens_drawn": round(float(point.drawn.mean()), 3),
        "tokens_drawn_se": round(float(point.drawn.std(ddof=1)) / n**0.5, 3),
        "seconds": round(point.seconds, 1),
    }


def compare(points: Sequence[Point]) -> list[dict[str, Any]]:
    """EIG's accuracy less each rival's at the same mean tokens, for each lambda."""
    random = np.random.default_rng(0)
    problems = len(points[0].correct)
    samples = [random.integers(0, problems, problems) for _ in range(DRAWS)]
    rows = []
    for tokens in ("reasoning", "drawn"):
        for ours in (p for p in points if p.rule in OURS):
            for rival in (THRESHOLD, BUDGET, VOTE):
                others = [p for p in points if p.rule == rival]
                here = at_tokens(others, ours, tokens, np.arange(problems))
                if np.isnan(here):
                    continue  # beyond what the rival's settings reach
                spread = [
                    ours.correct[s].mean() - at_tokens(others, ours, tokens, s) for s in samples
                ]
                low, high = np.nanquantile(spread, [0.025, 0.975])
                rows.append(
                    {
                        "equal": tokens,
                        "rule": ours.rule,
                        "lambda": ours.setting,
                        "tokens": round(float(getattr(ours, tokens).mean()), 2),
                        "rival": rival,
                        "accuracy_eig": round(float(ours.correct.mean()), 4),
                        "accuracy_rival": round(float(here), 4),
                        "difference": round(float(ours.correct.mean() - here), 4),
                        "low": round(float(low), 4),
                        "high": round(float(high), 4),
                    }
                )
    return rows


def at_tokens(others: Sequence[Point], ours: Point, tokens: str, sample: np.ndarray) -> float:
    """Accuracy of a rule's mixture of settings with our mean tokens; NaN outside its range."""
    cost = np.array([getattr(p, tokens)[sample].mean() for p in others])
    accuracy = np.array([p.correct[sample].mean() for p in others])
    order = np.argsort(cost)
    wanted = getattr(ours, tokens)[sample].mean()
    return float(np.interp(wanted, cost[order], accuracy[order], left=np.nan, right=np.nan))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against both counts of tokens, with 95 % intervals."""
    from matplotlib.figure import Figure

    from vllm.score.report.style import style

    markers = {EIG: "o", FAR: "*", THRESHOLD: "s", BUDGET: "^", VOTE: "D"}
    with style():
        figure = Figure(figsize=(12, 4.8))
        left, right = figure.subplots(1, 2, sharey=True)
        panels = {"reasoning_tokens": (left, "tokens of reasoning, mean of a problem")}
        panels["tokens_drawn"] = (right, "all tokens drawn, forecasts included")
        for (tokens, (axes, label)), (rule, marker) in itertools.product(
            panels.items(), markers.items()
        ):
            found = [row for row in rows if row["rule"] == rule]
            found.sort(key=lambda row: float(row[tokens]))
            x, error, y, low, high = (
                np.array([float(row[name]) for row in found])
                for name in (tokens, f"{tokens}_se", "accuracy", "low", "high")
            )
            bars = {"yerr": [y - low, high - y], "xerr": 1.96 * error, "elinewidth": 0.8}
            axes.errorbar(x, y, marker=marker, markersize=5, linewidth=1.3, label=rule, **bars)
            axes.set(xlabel=label)
        left.set(ylabel="accuracy", title="Chained additions: when to stop", xlim=(-0.2, 5))
        right.set(xlim=(-0.5, 25))
        left.legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    engines.add_arguments(parser)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--mc-samples", type=int, default=5)
    parser.add_argument("--beam-size", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=64, help="problems at once")
    return parser.parse_args()


if __name__ == "__main__":
    main()
