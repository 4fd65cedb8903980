"""Pairs from files, results to files, the table."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from argparse import Namespace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from vllm.score import ScoreModeError
from vllm.score.cli import inputs
from vllm.score.cli.sequence import (
    WRITABLE,
    results_table,
    table_notes,
    write_results,
)

MESSAGES = [{"role": "user", "content": 'say "x", 漢'}]
ROWS = [("a, b", " c"), ("", "NA"), ("two\nlines", "1"), ('"quoted"', "é漢😀"), ("null", "  ")]


def read_pairs(paths, context_column=None, target_column=None, skip_empty=False):
    """(pairs, their names, notes) of files, as `vllm-score sequence` reads them."""
    columns = {"context_column": context_column, "target_column": target_column}
    options = {"context": [], "target": [], "chat": False, "skip_empty": skip_empty}
    found = inputs.read_pairs(Namespace(file=list(map(str, paths)), **columns, **options))
    return list(found.rows), list(found.names), list(found.notes)


def result(context, sequence, **changes):
    row = {
        "context": context,
        "sequence": sequence,
        "log_prob": -1.5,
        "prob": math.exp(-1.5),
        "perplexity": math.exp(1.5),
        "num_tokens": 2,
        "log_prob_per_token": -0.75,
        "perplexity_per_token": math.exp(0.75),
        "token_ids": [3, 4],
        "token_log_probs": [-1.0, -0.5],
        "spans_boundary": False,
        "spanned_context": "",
    }
    return {**row, **changes}


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_texts_are_read_as_they_stand(kind, tmp_path):
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        lines = (json.dumps({"target": t, "more": 1, "context": c}) for c, t in ROWS)
        path.write_text("\n\n".join(lines))
    elif kind == "parquet":
        columns = {"context": [c for c, _ in ROWS], "target": [t for _, t in ROWS]}
        pq.write_table(pa.table(columns), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerow(["more", "target", "context"])
            writer.writerows([1, t, c] for c, t in ROWS)
    assert read_pairs([path]) == (ROWS, [f"{path}, row {n}" for n in range(1, 6)], [])


def test_a_row_of_csv_may_be_long(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text(f"context,target\n{'ab ' * 1_000_000},c\n")
    assert read_pairs([path])[0] == [("ab " * 1_000_000, "c")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_contexts_may_be_messages(kind, tmp_path):
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"context": MESSAGES, "target": "b"}, ensure_ascii=False))
    else:
        pq.write_table(pa.table({"context": [MESSAGES], "target": ["b"]}), path)
    assert read_pairs([path])[0] == [(MESSAGES, "b")]


def test_results_are_written_with_all_that_they_hold(tmp_path):
    rows = [result(c, t) for c, t in ROWS]
    rows += [result(MESSAGES, "b", perplexity=math.inf, spans_boundary=True, spanned_context=" ")]
    for kind in ("csv", "jsonl", "parquet"):
        write_results(rows, tmp_path / f"out.{kind}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.jsonl", "out.parquet"]

    lines = (tmp_path / "out.jsonl").read_text().strip("\n").split("\n")
    back = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert back == [*rows[:-1], {**rows[-1], "perplexity": "Infinity"}]

    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert table[:-1] == rows[:-1]
    assert table[-1] == {**rows[-1], "context": json.dumps(MESSAGES, ensure_ascii=False)}

    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    for row, cell in zip(rows, cells, strict=True):
        assert set(row) == set(cell)
        assert cell["sequence"] == row["sequence"]
        assert float(cell["perplexity"]) == row["perplexity"]
        assert json.loads(cell["token_log_probs"]) == row["token_log_probs"]
        assert cell["spans_boundary"] == str(row["spans_boundary"])
    assert json.loads(cells[-1]["context"]) == MESSAGES


def test_what_was_written_can_be_read_again(tmp_path):
    write_results([result(c, t) for c, t in ROWS], tmp_path / "out.csv")
    assert read_pairs([tmp_path / "out.csv"], "context", "sequence")[0] == ROWS
    with pytest.raises(ScoreModeError, match=r"'target' is not in .* 'spanned_context'"):
        read_pairs([tmp_path / "out.csv"])


def test_pairs_without_a_target_are_skipped(tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.jsonl.gz"
    one.write_text("context,target\n,a\nb,\n")
    two.write_bytes(gzip.compress(b'{"target": "c"}\n{"target": "d", "context": ""}\n'))
    with pytest.raises(ScoreModeError, match=r"'context' is not in .*gz', row 1; .* 'target'"):
        read_pairs([two, one])
    pairs, names, skipped = read_pairs([one, two], skip_empty=True)
    assert pairs == [("", "a"), ("", "d")]
    assert names == [f"{one}, row 1", f"{two}, row 2"]
    assert skipped == [
        "2 rows were skipped, without a value in 'target' or 'context': the first is "
        f"file {str(one)!r}, row 2 (line 3)"
    ]


def test_results_of_any_name_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run:1", "s3:x", "a::b", "x[1]"):
        for kind in WRITABLE:
            path = Path(name + kind)
            write_results([result("a", "b")], path)
            assert read_pairs([path], "context", "sequence")[0] == [("a", "b")]


def test_the_table_fits_80_columns():
    rows = [result("The capital of a country" * 9, f" answer {i}" * 9) for i in range(60)]
    rows[1] |= {"spans_boundary": True, "spanned_context": " ", "prob": 1.23456e-15}
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    console.print(results_table(rows))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 51 and max(map(len, lines)) <= 80
    assert "of a country'" in lines[1] and "of a country" not in lines[2]
    assert "-1.5000" in lines[1] and "1.235e-15" in lines[2]
    more, spanning = table_notes(rows)
    assert more.startswith("and 10 more")
    assert "1 of 60 scored from the start of a token" in spanning and "' ' before" in spanning
    assert table_notes(rows[:1]) == []
