"""One table of several runs of lm-eval on the same task.

    python examples/eig/compare.py FOLDER NAME ...

reads FOLDER/NAME/**/results_*.json and samples_*.jsonl, as `lm_eval --output_path FOLDER/NAME
--log_samples` writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm_score_command import one_line_errors


def newest(folder: Path, pattern: str) -> Path:
    """The file of the last run.

    Raises:
        ScoreModeError: there is none.
    """
    found = sorted(folder.rglob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ScoreModeError(f"{str(folder)!r} has no {pattern}; run lm_eval with --output_path")
    return found[-1]


def metrics(results: dict[str, Any]) -> Iterator[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of a run."""
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, kind = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{kind}")
                yield task, key, value, error if isinstance(error, float) else None


def mean_characters(folder: Path) -> float:
    """Mean length of the texts of a run."""
    lines = newest(folder, "samples_*.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {row["doc_id"]: row["resps"][0][0] for row in map(json.loads, lines)}
    return sum(map(len, texts.values())) / len(texts)


def compare(folder: Path, names: list[str]) -> None:
    """Print the metrics of several runs of lm-eval in one table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(("run", "task", "metric", "value", "± stderr", "characters")):
        table.add_column(column, justify="right" if number > 2 else "left", no_wrap=True)
    for name in names:
        results = json.loads(newest(folder / name, "results_*.json").read_text(encoding="utf-8"))
        length = f"{mean_characters(folder / name):.1f}"
        for task, key, value, error in metrics(results):
            shown = "-" if error is None else f"{error:.4f}"
            table.add_row(name, task, key, f"{value:.4f}", shown, length)
    # A file or a pipe has no width to cut the table to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=compare.__doc__)
    parser.add_argument("folder", type=Path, help="holds a folder for each run")
    parser.add_argument("names", nargs="+", help="of these folders")
    with one_line_errors(parser.prog):
        compare(**vars(parser.parse_args()))
