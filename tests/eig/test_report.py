"""Figures, tables and files of traces made by hand; every expected number is worked out here."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tests.eig.trace_data import FAILED, FIRST, SECOND, trace
from vllm.score.eig.records import (
    COST,
    FAILURE,
    GAIN,
    TIME,
    AnswerPosterior,
    Decision,
    GainEstimate,
    Trace,
)
from vllm.score.eig.report import (
    METRICS,
    EIGMetrics,
    get_eig_metrics_summary,
    print_eig_metrics,
    reset_eig_metrics,
    run_table,
    summarize_run,
    wilson_interval,
    write_traces,
)
from vllm.score.errors import ScoreModeError


def posterior(entropy: float) -> AnswerPosterior:
    half = np.log([0.5, 0.5])
    return AnswerPosterior(["a", "b"], half, half, entropy, 1.0)


def estimate(entropy: float, gain: float, error: float) -> GainEstimate:
    return GainEstimate(entropy, entropy - gain, gain, error, gain, gain)


# Two questions: three steps that paid and a stop for the cost; one step, then the forecast takes
# too long. Then a question whose candidates fail, and one whose posterior does.
TRACE = [
    Decision(
        True,
        GAIN,
        posterior(2.0),
        estimate(2.0, 0.75, 0.125),
        seconds={"candidates": 0.5, "posterior": 0.25, "sampling": 2.0},
        tokens_sampled=1000,
        tokens_scored=100,
    ),
    Decision(
        True,
        GAIN,
        posterior(1.25),
        estimate(1.25, 0.5, 0.25),
        seconds={"candidates": 0.25, "posterior": 0.25, "sampling": 1.0},
        tokens_sampled=300,
        tokens_scored=40,
    ),
    Decision(
        True,
        GAIN,
        posterior(1.0),
        estimate(1.0, 0.25, math.nan),
        seconds={"candidates": 0.25, "posterior": 0.25, "sampling": 1.0},
        tokens_sampled=300,
        tokens_scored=40,
    ),
    Decision(
        False,
        COST,
        posterior(0.5),
        estimate(0.5, -0.5, 0.375),
        seconds={"candidates": 0.25, "posterior": 0.25, "sampling": 1.0},
        tokens_sampled=300,
        tokens_scored=40,
    ),
    Decision(
        True,
        GAIN,
        posterior(1.75),
        estimate(1.75, 1.0, 0.25),
        seconds={"candidates": 0.25, "posterior": 0.25, "sampling": 1.0},
        tokens_sampled=300,
        tokens_scored=40,
    ),
    Decision(
        False,
        TIME,
        posterior(1.0),
        failure=("sampling", "30 s have passed"),
        seconds={"candidates": 0.25, "posterior": 0.25, "sampling": 29.5},
        tokens_sampled=40,
        tokens_scored=20,
    ),
    Decision(False, FAILURE, failure=("candidates", "none"), seconds={"candidates": 0.25}),
    Decision(
        False,
        FAILURE,
        failure=("posterior", "the engine is gone"),
        seconds={"candidates": 0.5, "posterior": 0.25},
        tokens_sampled=10,
    ),
]
# decisions 8, of them continued 4: 50 %; without failure 5: 62.5 %
# gains .75 .5 .25 -.5 1: sum 2, mean .4; squared distances .1225 .01 .0225 .81 .36: sum 1.325;
#   / 4 = .33125, std .5755432
# entropies 2 1.25 1 .5 1.75 1: sum 7.5, mean 1.25; squares .5625 0 .0625 .5625 .25 .0625:
#   sum 1.5; / 5 = .3, std .5477226
# standard errors .125 .25 .375 .25: sum 1, mean .25 (the NaN is left out)
# candidates 0.5 + 6 x 0.25 + 0.5 = 2.5, / 8 = 0.3125; posterior 7 x 0.25 = 1.75, / 7;
#   sampling 2 + 4 x 1 + 29.5 = 35.5, / 6 = 5.91667
# sampled 1000 + 4 x 300 + 40 + 10 = 2250; scored 100 + 4 x 40 + 20 = 280
PRINTED = """\
decisions                8
continued                4
continue rate       50.0 %
stopped: cost            1
stopped: failure         2
stopped: time            1
success rate        62.5 %
tokens sampled       2,250
tokens scored          280

nats               count     mean      std      min     max
information gain       5   0.4000   0.5755  -0.5000  1.0000
entropy                6   1.2500   0.5477   0.5000  2.0000
standard error             0.2500

seconds        total    mean
candidates    2.5000  0.3125
posterior     1.7500  0.2500
sampling     35.5000  5.9167

failures    failed  time limit
candidates       1           0
posterior        1           0
sampling         0           1
"""


@pytest.fixture
def process_metrics() -> Iterator[EIGMetrics]:
    reset_eig_metrics()
    yield METRICS
    reset_eig_metrics()


@pytest.fixture
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def recorders(metrics: EIGMetrics, decisions: list[Decision]) -> list[threading.Thread]:
    """Eight threads that record the decisions in turn, a thousand each; started."""
    start = threading.Barrier(8)

    def record() -> None:
        start.wait()
        for number in range(1000):
            metrics.record(decisions[number % len(decisions)])

    threads = [threading.Thread(target=record) for _ in range(8)]
    for thread in threads:
        thread.start()
    return threads


def cells(text: str) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


def test_the_summary_of_a_trace_made_by_hand():
    metrics = EIGMetrics()
    for decision in TRACE:
        metrics.record(decision)
    found = metrics.summary()
    assert found == {
        "decisions": 8,
        "continued": 4,
        "continue_rate": 0.5,
        "stops": {"cost": 1, "failure": 2, "time": 1},
        "information_gain": {
            "count": 5,
            "mean": pytest.approx(0.4, rel=1e-12),
            "std": pytest.approx(math.sqrt(1.325 / 4), rel=1e-12),
            "min": -0.5,
            "max": 1.0,
        },
        "entropy": {
            "count": 6,
            "mean": pytest.approx(1.25, rel=1e-12),
            "std": pytest.approx(math.sqrt(0.3), rel=1e-12),
            "min": 0.5,
            "max": 2.0,
        },
        "standard_error": pytest.approx(0.25, rel=1e-12),
        "seconds": {
            "candidates": {"total": pytest.approx(2.5), "mean": pytest.approx(0.3125)},
            "posterior": {"total": pytest.approx(1.75), "mean": pytest.approx(0.25)},
            "sampling": {"total": pytest.approx(35.5), "mean": pytest.approx(35.5 / 6)},
        },
        "tokens_sampled": 2250,
        "tokens_scored": 280,
        "success_rate": 0.625,
        "failures": {
            "candidates": {"failure": 1, "time": 0},
            "sampling": {"failure": 0, "time": 1},
            "posterior": {"failure": 1, "time": 0},
        },
    }


def test_every_figure_is_printed(process_metrics):
    for decision in TRACE:
        process_metrics.record(decision)
    stream = io.StringIO()
    print_eig_metrics(stream)
    assert cells(stream.getvalue()) == cells(PRINTED)


def test_standard_output_is_the_default(process_metrics, capsys):
    process_metrics.record(TRACE[0])
    print_eig_metrics()
    printed = capsys.readouterr().out
    assert ["decisions", "1"] in cells(printed)
    assert ["information gain", "1", "0.7500", "-", "0.7500", "0.7500"] in cells(printed)
    assert "\x1b" not in printed


def test_nothing_recorded(process_metrics):
    found = get_eig_metrics_summary()
    none = {"count": 0, "mean": None, "std": None, "min": None, "max": None}
    assert found["information_gain"] == found["entropy"] == none
    assert found["decisions"] == found["continued"] == 0
    assert found["continue_rate"] is found["success_rate"] is found["standard_error"] is None
    assert found["stops"] == found["seconds"] == found["failures"] == {}
    stream = io.StringIO()
    print_eig_metrics(stream)
    printed = cells(stream.getvalue())
    assert ["decisions", "0"] in printed and ["continue rate", "-"] in printed
    assert ["information gain", "0", "-", "-", "-", "-"] in printed
    assert "nan" not in stream.getvalue().lower()


def test_reset(process_metrics):
    before = get_eig_metrics_summary()
    process_metrics.record(TRACE[5])
    assert get_eig_metrics_summary() != before
    reset_eig_metrics()
    assert get_eig_metrics_summary() == before


def test_large_values_lose_no_digits():
    metrics = EIGMetrics()
    for value in (1e8 + 1, 1e8 + 2, 1e8 + 4, math.inf):
        metrics.record(Decision(True, GAIN, posterior(value)))
    assert metrics.summary()["entropy"] == {
        "count": 3,
        "mean": pytest.approx(1e8 + 7 / 3, abs=1e-6),
        "std": pytest.approx(math.sqrt(7 / 3), rel=1e-6),
        "min": 1e8 + 1,
        "max": 1e8 + 4,
    }


def test_a_summary_is_a_copy_and_json():
    metrics = EIGMetrics()
    metrics.record(TRACE[5])
    metrics.record(Decision(False, FAILURE))
    found = metrics.summary()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["failures"]["unknown"] == {"failure": 1, "time": 0}
    found["failures"]["sampling"]["time"] = 99
    assert metrics.summary()["failures"]["sampling"]["time"] == 1


def test_threads_lose_no_record(switching_often):
    metrics = EIGMetrics()
    decisions = [TRACE[0], TRACE[3], TRACE[5], TRACE[6]]
    for thread in recorders(metrics, decisions):
        thread.join()
    found: dict[str, Any] = metrics.summary()
    assert found["decisions"] == 8000
    assert found["continued"] == 2000
    assert found["stops"] == {"cost": 2000, "failure": 2000, "time": 2000}
    assert found["tokens_sampled"] == 2000 * (1000 + 300 + 40)
    assert found["tokens_scored"] == 2000 * (100 + 40 + 20)
    # Half of 4000 gains are 0.75, half -0.5: mean 0.125, each 0.625 away from it.
    gain = found["information_gain"]
    assert gain["count"] == 4000
    assert gain["mean"] == pytest.approx(0.125, rel=1e-9)
    assert gain["std"] == pytest.approx(0.625 * math.sqrt(4000 / 3999), rel=1e-9)
    assert found["seconds"]["candidates"]["total"] == pytest.approx(2000 * 1.25, rel=1e-9)
    assert found["failures"]["sampling"] == {"failure": 0, "time": 2000}


def test_a_summary_holds_whole_records(switching_often):
    metrics = EIGMetrics()
    threads = recorders(metrics, [TRACE[0], TRACE[3]])
    found = []
    while any(thread.is_alive() for thread in threads):
        found.append(metrics.summary())
    found.append(metrics.summary())
    for each in found:
        number = each["decisions"]
        assert each["entropy"]["count"] == each["information_gain"]["count"] == number
        assert each["continued"] + sum(each["stops"].values()) == number
        assert each["tokens_scored"] == 100 * each["continued"] + 40 * (number - each["continued"])
    assert found[-1]["decisions"] == 8000


TRACES = [FIRST, SECOND, FAILED, trace([0], [0.25], [0.0], [0.5], answer="7")]


def printed(traces: list[Trace], *gold: Any) -> list[list[str]]:
    stream = io.StringIO()
    console = Console(file=stream, width=80, highlight=False)
    console.print(run_table(summarize_run(traces, *gold)))
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
        ["total", "per question"],
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
    with pytest.raises(ScoreModeError, match=f"gold has {len(gold)} entries for 4 traces"):
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
