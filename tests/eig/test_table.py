"""Sums over a run, and its file, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.eig.trace_data import FAILED, FIRST, SECOND, trace
from vllm.score.eig.table import print_run, summarize_run, wilson_interval
from vllm.score.eig.traces_file import write_traces
from vllm.score.eig.types import Trace
from vllm.score.errors import ScoreModeError

TRACES = [FIRST, SECOND, FAILED, trace([0], [0.25], [0.0], [0.5], answer="7")]


def cells(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def printed(traces: list[Trace], *gold: Any) -> list[list[str]]:
    stream = io.StringIO()
    print_run(summarize_run(traces, *gold), Console(file=stream, width=80, highlight=False))
    return cells(stream.getvalue())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The roots p of (successes / trials - p)^2 = z^2 p (1 - p) / trials."""
    z = 1.959963984540054
    share = successes / trials
    a, b, c = 1 + z * z / trials, -(2 * share + z * z / trials), share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def test_the_table_of_a_run():
    # Tokens of reasoning 20 + 24; sampled 100 a decision and the reasoning: 900 + 44.
    # H: start 2, 1.5, none, 0.25: 1.25; end 0.25, 0.5, none, 0.25: 1 / 3.
    assert printed(TRACES, ["12", "13", "12", None]) == [
        ["total", "a question"],
        ["questions", "4"],
        ["answered", "3"],
        ["correct", "1", "33.3 %", "of 3, 95 % interval 6.1 to 79.2 %"],
        ["reasoning tokens", "44", "11.00"],
        ["sampled tokens", "944", "236.0"],
        ["decisions", "9", "2.250"],
        ["entropy at the start", "1.250", "nats"],
        ["entropy at the end", "0.3333", "nats"],
        ["stopped: cost", "3"],
        ["stopped: failure", "1"],
    ]


def test_the_summary_of_a_run():
    found = summarize_run(TRACES, ["12", "13", "12", None])
    assert (found.questions, found.answered, found.judged, found.correct) == (4, 3, 3, 1)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.interval == pytest.approx(wilson(1, 3), rel=1e-9)
    assert (found.reasoning_tokens, found.tokens_sampled, found.decisions) == (44, 944, 9)
    assert found.stops == {"cost": 3, "failure": 1}
    assert (found.entropy_start, found.entropy_end) == pytest.approx((1.25, 1 / 3))


@pytest.mark.parametrize("gold", [(), (None,), ([None] * 4,)])
def test_without_gold_answers_there_is_no_accuracy(gold):
    assert not [row for row in printed(TRACES, *gold) if row[0] == "correct"]
    assert summarize_run(TRACES, *gold).accuracy is None


def test_answers_are_compared_as_the_task_says():
    gold = ["12.0", "12", "12", "8"]
    assert summarize_run(TRACES, gold).correct == 1
    numbers = summarize_run(TRACES, gold, equal=lambda a, b: float(a) == float(b))
    assert (numbers.correct, numbers.judged) == (2, 4)


def test_nothing_to_add_up():
    rows = printed([])
    assert ["questions", "0"] in rows and ["decisions", "0", "-"] in rows
    assert ["entropy at the start", "-", "nats"] in rows
    failed = printed([FAILED], ["12"])
    assert ["correct", "0", "0.0 %", "of 1, 95 % interval 0.0 to 79.3 %"] in failed
    assert ["entropy at the end", "-", "nats"] in failed


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (5, 5), (3, 10), (999, 1000), (0, 50)])
def test_wilson(successes, trials):
    assert wilson_interval(successes, trials) == pytest.approx(
        wilson(successes, trials), rel=1e-9, abs=1e-12
    )


@pytest.mark.parametrize("gold", [[], ["1"], ["1"] * 5])
def test_gold_answers_of_another_number_are_refused(gold, tmp_path: Path):
    with pytest.raises(ScoreModeError, match=f"gold has {len(gold)} answers for 4 traces"):
        summarize_run(TRACES, gold)
    for name in ("gold", "questions"):
        with pytest.raises(ScoreModeError, match=f"{name} has {len(gold)} entries for 4 traces"):
            write_traces(TRACES, tmp_path / "a.jsonl", **{name: gold})
    assert not list(tmp_path.iterdir())


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text(encoding="utf-8").splitlines()  # also splits at U+2028
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_traces_can_be_read_back(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    questions = ["What is 5 + 7?", "b\nb", "ü", ""]
    write_traces(TRACES, path, questions=questions, gold=["12", None, "12", "8"])
    rows = read(path)
    assert list(tmp_path.iterdir()) == [path]
    assert [row["question"] for row in rows] == questions
    assert [row["gold"] for row in rows] == ["12", None, "12", "8"]
    assert [row["answer"] for row in rows] == ["12", "12", None, "7"]
    for row, each in zip(rows, TRACES, strict=True):
        assert row["prompt_token_ids"] == [1, 2, 3]
        assert row["reasoning_token_ids"] == each.reasoning_token_ids
        assert row["reasoning"] == each.reasoning and row["ended"] is False
        assert len(row["steps"]) == len(each.steps)
    second = rows[1]
    assert second["reasoning_tokens"] == 24 and second["tokens_sampled"] == 424
    steps = second["steps"]
    assert [step["position"] for step in steps] == [0, 8, 16, 24]
    assert [step["entropy"] for step in steps] == [1.5, None, 1.0, 0.5]
    assert [step["gain"] for step in steps] == [0.75, None, 0.5, 0.0]
    assert [step["standard_error"] for step in steps] == [None, None, 0.25, 0.5]
    assert [step["go_on"] for step in steps] == [True, True, True, False]
    assert [step["reason"] for step in steps] == ["gain", "gain", "gain", "cost"]
    assert [step["tokens"] for step in steps] == [8, 8, 8, 0]
    assert [step["prompt"] for step in steps] == ["", "Wait,", "Wait,", "Wait,"]
    assert steps[0]["text"] == "xxxxxxxx"
    assert (steps[0]["tokens_sampled"], steps[0]["tokens_scored"]) == (100, 7)
    assert steps[0]["seconds"] == {"posterior": 0.5}
    assert steps[0]["coverage"] == 0.75 and steps[0]["mutual_information"] == 0.5
    assert steps[1]["candidates"] == [] and steps[1]["failure"] is None
    first, other = steps[0]["candidates"]
    assert (first["answer"], other["answer"]) == ("12", "é\u2028")
    assert first["logprob"] == pytest.approx(math.log(0.5)) and other["logprob"] == pytest.approx(
        math.log(0.25)
    )
    assert (first["posterior"], other["posterior"]) == pytest.approx((2 / 3, 1 / 3))
    (failed,) = rows[2]["steps"]
    assert failed["failure"] == {"kind": "posterior", "message": "no engine"}


def test_questions_and_gold_answers_may_be_missing(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    write_traces([FIRST], path)
    (row,) = read(path)
    assert "question" not in row and "gold" not in row


def test_a_file_is_replaced_entirely_or_not_at_all(tmp_path: Path):
    path = tmp_path / "traces.jsonl"
    write_traces(TRACES, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_traces([FIRST, FIRST], path, questions=["fine", object()])  # type: ignore[list-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_traces([FIRST], path)
    assert len(read(path)) == 1
