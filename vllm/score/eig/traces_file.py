"""Traces as a file of JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.score.eig.types import Decision, Step, Trace
from vllm.score.errors import ScoreModeError

ESTIMATES = (
    "gain",
    "standard_error",
    "expected_entropy",
    "entropy_difference",
    "mutual_information",
)


def write_traces(
    traces: Sequence[Trace],
    path: str | Path,
    *,
    questions: Sequence[str] | None = None,
    gold: Sequence[str | None] | None = None,
) -> None:
    """One object a line for each trace, see `trace_record`; the file is there entirely or not.

    Args:
        questions: their texts, one a trace.
        gold: the right answers, one a trace; None where it is not known.

    Raises:
        ScoreModeError: `questions` or `gold` is of another length.
    """
    for name, given in (("questions", questions), ("gold", gold)):
        if given is not None and len(given) != len(traces):
            raise ScoreModeError(
                f"{name} has {len(given)} entries for {len(traces)} traces; give one each"
            )
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for number, trace in enumerate(traces):
                record: dict[str, Any] = {}
                if questions is not None:
                    record["question"] = questions[number]
                if gold is not None:
                    record["gold"] = gold[number]
                record.update(trace_record(trace))
                # Escapes beyond ASCII: no reader takes U+2028 for the end of a line.
                file.write(json.dumps(record, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def trace_record(trace: Trace) -> dict[str, Any]:
    """A trace as JSON has it: nats, tokens, seconds; null for NaN and for what is not there."""
    return {
        "answer": trace.answer,
        "ended": trace.ended,
        "reasoning": trace.reasoning,
        "reasoning_tokens": len(trace.reasoning_token_ids),
        "tokens_sampled": trace.tokens_sampled,
        "prompt_token_ids": [int(token) for token in trace.prompt_token_ids],
        "reasoning_token_ids": [int(token) for token in trace.reasoning_token_ids],
        "steps": [_step_record(step) for step in trace.steps],
    }


def _step_record(step: Step) -> dict[str, Any]:
    decision = step.decision
    estimate = decision.estimate
    record: dict[str, Any] = {
        "position": step.position,
        "go_on": decision.go_on,
        "reason": decision.reason,
        "entropy": None if decision.posterior is None else _number(decision.posterior.entropy),
    }
    for name in ESTIMATES:
        record[name] = None if estimate is None else _number(getattr(estimate, name))
    failure = decision.failure
    return record | {
        **_posterior_record(decision),
        "failure": None if failure is None else {"kind": failure[0], "message": failure[1]},
        "seconds": {name: _number(value) for name, value in decision.seconds.items()},
        "tokens_sampled": decision.tokens_sampled,
        "tokens_scored": decision.tokens_scored,
        "prompt": step.prompt,
        "text": step.text,
        "tokens": step.tokens,
    }


def _posterior_record(decision: Decision) -> dict[str, Any]:
    posterior = decision.posterior
    if posterior is None:
        return {"coverage": None, "candidates": []}
    rows = zip(posterior.answers, posterior.logprobs, posterior.log_posterior, strict=True)
    return {
        "coverage": _number(posterior.coverage),
        "candidates": [
            {"answer": answer, "logprob": _number(own), "posterior": _number(math.exp(share))}
            for answer, own, share in rows
        ],
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
