"""Figures of traces made by hand; every expected number is worked out here."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.eig.metrics import (
    METRICS,
    EIGMetrics,
    Moments,
    get_eig_metrics_summary,
    print_eig_metrics,
    reset_eig_metrics,
)
from vllm.score.eig.types import (
    COST,
    FAILURE,
    GAIN,
    TIME,
    AnswerPosterior,
    Decision,
    GainEstimate,
)


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


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50), st.sampled_from([0.0, 1e8]))
def test_moments_are_numpys(values, offset):
    moments = Moments()
    for value in [math.nan, *(value + offset for value in values), math.inf]:
        moments.add(value)
    array = np.asarray(values) + offset
    found = moments.summary()
    assert found["count"] == len(values)
    assert found["mean"] == pytest.approx(array.mean(), rel=1e-9, abs=1e-6)
    assert found["std"] == pytest.approx(array.std(ddof=1), rel=1e-6, abs=1e-6)
    assert (found["min"], found["max"]) == (array.min(), array.max())
