"""`vllm-score sequence`: what it refuses, and a real run as users start it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vllm.score.cli import main


@pytest.fixture
def refusal(capsys, monkeypatch):
    """`refusal(*arguments)`: the one line that the command ends with, before any engine."""
    from vllm.score.cli import model

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(model, "open_llm", started)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(["sequence", *map(str, arguments)])
        assert exit_.value.code in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.strip().splitlines()
        assert re.match("vllm-score( sequence)?: ", line)
        return line

    return run


PAIR = ["--context", "a", "--target", " b"]
OPTIONS = [
    (["M"], "nothing to score; give --context TEXT --target TEXT, or --file"),
    ([], "nothing to score"),
    (["M", "--target", "b"], "--target is given without --context; .*--context '' for none"),
    (["M", "--context", "a"], "--context is given without --target"),
    (["M", *PAIR, "--file", "p.csv"], "--file and --context and --target each name pairs"),
    (["M", *PAIR, "--context-column", "q"], "--context-column is 'q', but no file"),
    (["M", *PAIR, "--skip-empty"], "--skip-empty is given, but no file is named; add --file"),
    (
        ["M", *PAIR, "--boundary", "loose"],
        "--boundary 'loose' is unknown.*spanning, strict, separate",
    ),
    (["M", "--model", "N", *PAIR], "two models.*'M'.*'N'"),
    (["--tokenizer", "T", *PAIR], "--tokenizer is 'T', but no model"),
    (["M", *PAIR, "-tp", "0"], "--tensor-parallel-size must be .* at least 1, got 0"),
    (["M", *PAIR, "--dtype", "float31"], "--dtype: invalid choice: 'float31'"),
    (["M", *PAIR, "--output", "o.txt"], r"--output 'o.txt'.*\.csv or \.jsonl or \.parquet"),
    (["M", "--file", "p.txt"], r"'p.txt' is of no kind that holds pairs.*\.csv"),
    (["M", "--file", "nowhere.csv"], "'nowhere.csv' does not exist"),
    (["./nowhere", *PAIR], "'./nowhere' does not exist"),
]


@pytest.mark.parametrize(("arguments", "message"), OPTIONS, ids=lambda value: str(value)[:50])
def test_options_are_refused(refusal, arguments, message):
    assert re.search(message, refusal(*arguments))


def test_files_without_pairs_are_refused(refusal, tmp_path):
    def message(name: str, content: str, *options: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return refusal("M", "--file", tmp_path / name, *options)

    assert "its columns are 'question', 'target'; name" in message("a.csv", "question,target\na,b")
    assert "'answer' is not in" in message("b.csv", "context,target\n", "--target-column", "answer")
    assert "has no rows" in message("c.csv", "context,target\n")
    assert "line 2 has 3 fields" in message("d.csv", "context,target\na,b,c\n")
    assert "cannot be read" in message("e.parquet", "no parquet")
    assert "line 2 is not JSON" in message("f.jsonl", '{"context": "", "target": "b"}\n{"con')
    assert "line 1 is [1]; give an object" in message("g.jsonl", "[1]")
    assert "its columns are 'text'" in message("h.jsonl", '{"text": "a"}')
    lines = '{"context": "a", "target": "b"}\n{"context": null, "target": "b"}\n'
    assert "row 2: 'context' is null; fill it in, or" in message("i.jsonl", lines)
    (tmp_path / "j.jsonl").write_text(lines)
    line = message("k.jsonl", lines[:34], tmp_path / "j.jsonl", "--target-column", "answer")
    assert "column 'answer' is not in" in line
    line = message("k.jsonl", '{"context": "a", "target": "b"}\n', tmp_path / "j.jsonl")
    assert "j.jsonl', row 2: 'context' is null" in line
    table = tmp_path / "a.csv"
    assert "is the text itself" in refusal("M", "--file", table, "--output", table)


def test_pairs_that_cannot_be_scored_are_refused(refusal, model_dir, tmp_path):
    model = model_dir("llama")  # 2,048 positions, no chat template
    message = refusal(model, "--context", "a", "--context", "c", "--target", "b", "--target", "")
    assert re.search("--context 'a', --target '': the continuation is empty", message)
    message = refusal(model, "--context", "漢" * 2000, "--target", " b")
    assert re.search("tokens together, the most that .* takes is 2048; shorten", message)
    message = refusal(model, *PAIR, "--chat")
    assert "--context 'a', --target ' b', context: the chat template does not take" in message
    message = refusal(model, "--context", "in ", "--target", "the", "--boundary", "strict")
    assert "the token ' the' holds both the end of the context" in message
    (tmp_path / "p.csv").write_text('q,a\n"a\nb",c\nNA,\n')
    columns = ("--context-column", "q", "--target-column", "a")
    message = refusal(model, "--file", tmp_path / "p.csv", *columns)
    assert re.search(r"p\.csv, row 2: the continuation is empty", message)


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["sequence", "-h"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--context", "--target", "--file", "--chat", "--boundary", "--output"):
        assert option in text


@pytest.mark.engine
def test_a_run_gives_hugging_faces_probabilities(model_dir, reference, tmp_path):
    from transformers import AutoTokenizer

    model = model_dir("llama")
    rows = [("The header of", " a message"), ("", "part"), ("in ", "the"), ("The header of", "NA")]
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "scores.parquet"
    lines = [json.dumps({"q": context, "a": target}) for context, target in rows]
    pairs.write_text("\n".join(lines) + "\n")
    ours = ("VLLM_", "TORCH_COMPILE", "HF_HUB_OFFLINE", "PYTHONWARNINGS")
    command = [Path(sys.executable).with_name("vllm-score"), "sequence", model, "--file", pairs]
    command += ["--context-column", "q", "--target-column", "a", "--dtype", "float32"]
    done = subprocess.run(
        [*map(str, command), "--output", str(output)],
        env={key: value for key, value in os.environ.items() if not key.startswith(ours)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = pq.read_table(output).to_pylist()
    assert [(row["context"], row["sequence"]) for row in table] == rows

    tokenizer = AutoTokenizer.from_pretrained(model)
    printed = done.stdout.splitlines()
    for row, line in zip(table, printed[1:], strict=False):
        ids = tokenizer.encode(row["context"] + row["sequence"])
        m = row["num_tokens"]
        ids = ids if m < len(ids) else [tokenizer.bos_token_id, *ids]
        assert row["token_ids"] == ids[-m:]
        logprobs = reference("llama", ids)[np.arange(len(ids) - 1 - m, len(ids) - 1), ids[-m:]]
        assert row["token_log_probs"] == pytest.approx(logprobs, abs=5e-5)
        assert row["log_prob"] == pytest.approx(logprobs.sum(), abs=1e-4)
        shown = next(float(word) for word in line.split() if re.fullmatch(r"-\d+\.\d+", word))
        assert shown == pytest.approx(logprobs.sum(), abs=1e-3)
    assert [row["spans_boundary"] for row in table] == [False, False, True, False]
    assert "1 of 4 scored from the start of a token" in " ".join(printed[5:])
    lines = done.stderr.splitlines()
    assert [line.partition(" (")[0] for line in lines[1:]] == [
        "vLLM is ready",
        "Scoring 4 pair(s)",
        "Scored",
        f"wrote {output}",
    ]
