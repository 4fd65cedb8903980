"""`vllm-score sequence`: the probability of sequences after contexts, as a table or a file."""

from __future__ import annotations

import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm.score.armed import require_score_mode
from vllm.score.checks import check_name
from vllm.score.cli.inputs import check_output, read_pairs
from vllm.score.cli.model import Model
from vllm.score.data.streams import atomic_write
from vllm.score.launch.engine import long_step, say, shows_bars
from vllm.score.report.table import count, head, json_safe, plain_table, significant, tail
from vllm.score.sequence.boundary import RULES
from vllm.score.sequence.scorer import prepare_pairs, score_prepared
from vllm.score.tiny.embedded import embedded_model

WRITABLE = (".csv", ".jsonl", ".parquet")
_LEAST_LENGTH = 256
_CHARACTERS = 18  # of a text, in an 80-column table
_ROWS = 50  # of the table


def sequence(options: Namespace, results: TextIO) -> None:
    """Score the pairs that the options name, and print and write the rows."""
    require_score_mode()
    progress = not options.quiet
    model = Model(options)
    output = check_output("output", options.output, WRITABLE, options.file)
    check_name("--boundary", options.boundary, RULES)
    pairs = read_pairs(options)
    model.read(lambda: embedded_model(progress=progress).directory)
    prepared = prepare_pairs(pairs.rows, model.tokenizer, options.boundary, pairs.names)
    longest = model.longest
    if longest is not None:
        prepared.check_length(longest, f"the most that {model.name!r} takes")
    needed = max(len(split.token_ids) for split in prepared.splits)
    llm = model.start(max(needed, min(_LEAST_LENGTH, longest or _LEAST_LENGTH)))
    bars = shows_bars(progress)
    with long_step(f"Scoring {len(prepared.splits)} pair(s)", "Scored", progress and not bars):
        rows = score_prepared(llm, prepared, use_tqdm=bars)
    _print(rows, pairs.notes, results, as_json=options.json)
    if output is not None:
        write_results(rows, output)
        say(f"wrote {output}", progress)


def _print(
    rows: Sequence[Mapping[str, Any]], notes: Sequence[str], stream: TextIO, *, as_json: bool
) -> None:
    if as_json:
        text = json.dumps(json_safe(rows), indent=2, ensure_ascii=False, allow_nan=False)
        print(text, file=stream, flush=True)
        for line in notes:
            print(line, file=sys.stderr)
        return
    console = Console(file=stream, highlight=False)
    console.print(results_table(rows))
    for line in (*table_notes(rows), *notes):
        console.print(line, markup=False)
    stream.flush()


def write_results(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One row per result, with its keys as columns; the file is there entirely or not at all.

    What a column of text cannot hold (lists in CSV, messages also in Parquet) is written as JSON.
    JSON has no infinity: in JSON lines a perplexity beyond float64 is the string "Infinity".
    """
    with atomic_write(path) as file:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            rows = [{**row, "context": _cell(row["context"])} for row in results]
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif path.suffix.lower() == ".csv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: _cell(value) for k, value in row.items()} for row in results)
            file.write(text.getvalue().encode())
        else:
            for row in map(json_safe, results):
                line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                file.write(line.encode())


def results_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """One row per result, the first 50 of them; a context is written once.

    `nats` is the log-probability, `per token` the same by the number of tokens.
    """
    numbers = ("nats", "prob", "tokens", "per token")
    table = plain_table("context", "sequence", *numbers, right=numbers)
    previous: Any = None
    for row in results[:_ROWS]:
        context, shown = row["context"], ""
        if context != previous:
            text = context if isinstance(context, str) else str(context[-1].get("content", ""))
            shown = tail(repr(text), _CHARACTERS)
        previous = context
        table.add_row(
            Text(shown),
            Text(head(repr(row["sequence"]), _CHARACTERS)),
            significant(row["log_prob"]),
            significant(row["prob"], 4),
            count(row["num_tokens"]),
            significant(row["log_prob_per_token"]),
        )
    return table


def table_notes(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table does not say."""
    lines = []
    if len(results) > _ROWS:
        lines.append(f"and {count(len(results) - _ROWS)} more (--output, --json)")
    spanning = [row for row in results if row["spans_boundary"]]
    if spanning:
        first = spanning[0]
        lines.append(
            f"{count(len(spanning))} of {count(len(results))} scored from the start of a token "
            "that also holds the end of the context, e.g. "
            f"{first['sequence'][:20]!r} with {first['spanned_context'][-20:]!r} before it"
        )
    return lines


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, float, int)) else json.dumps(value, ensure_ascii=False)
