"""What every benchmark shares: interleaved rounds, agreement of the numbers, a row a contender.

A contender is timed against the others in the same process run, in turns, because machines
wander; a figure that is quoted is a ratio of medians from one run.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: as printed.
        run: does the whole work once and returns what `check` compares.
        rounds: timed rounds; slow contenders may have fewer.
        work: units of work a run, for the rate.
        warm: a small piece of the work, run once before; None runs all of it.
        seconds: filled in, one a round.
    """

    name: str
    run: Callable[[], Any]
    work: float
    rounds: int = 3
    warm: Callable[[], Any] | None = None
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
    for number in range(max(c.rounds for c in contenders)):
        for c in contenders:
            if number < c.rounds:
                begin = time.perf_counter()
                results[c.name] = c.run()
                c.seconds.append(time.perf_counter() - begin)
    return results


def machine() -> dict[str, str]:
    """Hardware and versions that a figure depends on."""
    from vllm.score.engine.status import versions

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
        found["gpu"] = torch.cuda.get_device_name()
    return {**found, **versions()}


def report(
    benchmark: str,
    contenders: Sequence[Contender],
    baseline: str,
    sizes: dict[str, Any],
    differences: dict[str, str],
    unit: str,
) -> None:
    """Print the table, add a row a contender to results/, and print the whole as JSON last.

    Args:
        baseline: the contender whose rate the ratios are multiples over.
        differences: by contender, how far its numbers are from the reference's.
        unit: of the rate.
    """
    about = machine()
    print(json.dumps({"machine": about, "sizes": sizes}))
    ours = next(c for c in contenders if c.name == baseline)
    print(f"{'contender':34} {'median s':>9} {'min..max s':>17} {unit:>12} {baseline + ' is':>14}")
    rows = []
    for c in contenders:
        spread = f"{min(c.seconds):.2f}..{max(c.seconds):.2f}"
        ratio = ours.rate / c.rate
        print(f"{c.name:34} {c.median:9.3f} {spread:>17} {c.rate:12.1f} {ratio:13.2f}x")
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
                "difference": differences.get(c.name, ""),
                "sizes": json.dumps(sizes),
                "machine": json.dumps(about),
            }
        )
    for name, text in differences.items():
        print(f"numbers of {name}: {text}")
    append(benchmark, rows)
    print(json.dumps(rows))


def append(benchmark: str, rows: list[dict[str, Any]]) -> None:
    """Add rows to results/<benchmark>.csv."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.csv"
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
