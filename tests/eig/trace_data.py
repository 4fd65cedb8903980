"""Traces made by hand for the tests of drawings, tables and files."""

from __future__ import annotations

import math

import numpy as np

from vllm.score.eig.records import (
    COST,
    FAILURE,
    GAIN,
    AnswerPosterior,
    Decision,
    GainEstimate,
    Step,
    Trace,
)

NAN = math.nan


def decision(
    go_on: bool, entropy: float, gain: float, error: float, reason: str | None = None
) -> Decision:
    """NaN: without posterior, without estimate."""
    logprobs = np.log([0.5, 0.25])
    posterior = AnswerPosterior(["12", "é\u2028"], logprobs, np.log([2 / 3, 1 / 3]), entropy, 0.75)
    return Decision(
        go_on,
        reason or (GAIN if go_on else COST),
        None if math.isnan(entropy) else posterior,
        None if math.isnan(gain) else GainEstimate(entropy, 0.0, gain, error, gain, 0.5),
        failure=("posterior", "no engine") if reason == FAILURE else None,
        seconds={"posterior": 0.5},
        tokens_sampled=100,
        tokens_scored=7,
    )


def trace(
    positions: list[int],
    entropies: list[float],
    gains: list[float],
    errors: list[float],
    answer: str | None = "12",
    last: str = COST,
) -> Trace:
    """One step at each position; the last one stops."""
    steps = []
    for number, position in enumerate(positions):
        more = number + 1 < len(positions)
        length = positions[number + 1] - position if more else 0
        made = decision(
            more, entropies[number], gains[number], errors[number], None if more else last
        )
        steps.append(Step(position, made, "Wait," if number else "", "x" * length, length))
    ids = list(range(positions[-1]))
    text = "so\n\ud83d" if answer is None else "so"  # a lone surrogate is no UTF-8
    drawn = sum(step.decision.tokens_sampled for step in steps) + len(ids)
    return Trace([1, 2, 3], ids, text, False, steps, answer, drawn)


FIRST = trace([0, 8, 20], [2.0, 1.0, 0.25], [1.0, 0.5, -0.125], [0.25, 0.125, 0.0625])
# No gain at its second decision, one forecast (no standard error) at its first.
SECOND = trace([0, 8, 16, 24], [1.5, NAN, 1.0, 0.5], [0.75, NAN, 0.5, 0.0], [NAN, NAN, 0.25, 0.5])
FAILED = trace([0], [NAN], [NAN], [NAN], answer=None, last=FAILURE)
