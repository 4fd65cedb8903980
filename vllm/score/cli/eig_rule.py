"""The rule and the settings that `vllm-score eig` runs with, checked before any engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from vllm.score.cli.inputs import Questions
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import candidate_source
from vllm.score.eig.entropy import ESTIMATORS, LENGTH_NORMALIZATIONS
from vllm.score.eig.parameters import BOUNDS, EIGParameters, check_values, did_you_mean
from vllm.score.eig.problems import (
    ANSWER_ROOM,
    Options,
    eig_problems,
    entropy_threshold_problems,
    fixed_budget_problems,
)
from vllm.score.eig.reasoning import DECIDE_AT
from vllm.score.eig.registry import SCALERS
from vllm.score.eig.types import Trace
from vllm.score.eig.work import Steps
from vllm.score.errors import ScoreModeError
from vllm.score.escapes import unescape

EIG = "expected_information_gain_reasoning"
THRESHOLD = "entropy_threshold_reasoning"
BUDGET = "fixed_budget_reasoning"
RULES = {name: SCALERS[name] for name in (EIG, THRESHOLD, BUDGET)}
END_OF_SEQUENCE = "EOS"
MAX_TOKENS_THINKING = 1024


@dataclass(frozen=True)
class Rule:
    """A scaler with all that it needs.

    Attributes:
        name: of the scaler.
        values: all of its parameters, within their ranges.
        estimator: of the gain.
        options: of the problems.
    """

    name: str
    values: Mapping[str, Any]
    estimator: str
    options: Options

    @property
    def room(self) -> int:
        """Tokens that a question needs behind it at most."""
        reasoning = self.options["max_tokens_thinking"]
        return (
            self.values.get("fixed_budget", reasoning) + self.values["sample_length"] + ANSWER_ROOM
        )

    @property
    def lambda_cost(self) -> float | None:
        """None for rules that have none."""
        return self.values.get("lambda_cost")

    def problems(
        self, tokenizer: Any, prompts: Sequence[Sequence[int]], max_model_len: int
    ) -> list[Steps[Trace]]:
        """One for each question, ready to run.

        Raises:
            ScoreModeError: a question for which there is no room.
        """
        shared = {name: value for name, value in self.values.items() if name in BOUNDS}
        parameters = EIGParameters(**shared)
        settings: dict[str, Any] = {"max_model_len": max_model_len, "options": self.options}
        if self.name == THRESHOLD:
            threshold = self.values["entropy_threshold"]
            return entropy_threshold_problems(tokenizer, prompts, parameters, threshold, **settings)
        if self.name == BUDGET:
            budget = self.values["fixed_budget"]
            return fixed_budget_problems(tokenizer, prompts, parameters, budget, **settings)
        settings["estimator"] = self.estimator
        return eig_problems(tokenizer, prompts, parameters, **settings)

    def check_choices(self, questions: Questions, tokenizer: Any) -> None:
        """Choices that can be scored.

        Raises:
            ScoreModeError: named by their row.
        """
        form = answer_format(self.options)
        if not questions.choices:
            return
        for choices, name in zip(questions.choices, questions.names, strict=True):
            try:
                candidate_source(choices)
                form.encode(tokenizer, choices)
            except ScoreModeError as error:
                raise ScoreModeError(f"{name}: {error}") from error


def make_rule(
    name: str,
    given: Mapping[str, Any],
    *,
    strict: bool,
    estimator: str | None,
    options: Mapping[str, Any],
    choices: Sequence[Sequence[str]],
) -> Rule:
    """From options as they are given, None where they are not.

    Args:
        name: of the scaler.
        given: its parameters.
        options: of the problems; texts with escapes.
        choices: candidate answers of each question; empty where there are none.

    Raises:
        ScoreModeError: for options out of range or that do not go together.
    """
    if name not in RULES:
        raise ScoreModeError(f"--scaler is {name!r}, which is no scaler{did_you_mean(name, RULES)}")
    found = {key: value for key, value in given.items() if value is not None}
    scaler = RULES[name]
    for key, value in found.items():
        if key not in scaler.parameters:
            raise ScoreModeError(
                f"--{key.replace('_', '-')} is {value!r}, which {name} does not take; leave it out"
            )
    if estimator is not None and name != EIG:
        raise ScoreModeError(f"--estimator is {estimator!r}, which {name} does not take")
    _check_choice("estimator", estimator or ESTIMATORS[0], ESTIMATORS)
    if choices:
        if options.get("candidates") is not None:
            raise ScoreModeError(
                "--candidates and --choices-column each name candidates; give one of them"
            )
        most = max(map(len, choices))
        found.setdefault("beam_size", most)
        if most > found["beam_size"] or most > BOUNDS["beam_size"].high:
            raise ScoreModeError(
                f"a question has {most} choices, more than --beam-size {found['beam_size']} (at "
                f"most {BOUNDS['beam_size'].high}); raise it or give fewer"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its record in the log is enough
        checked = check_values(found, scaler.bounds, strict=strict)
    values = {
        key: checked.get(key, bound.kind(bound.default)) for key, bound in scaler.bounds.items()
    }
    if (estimator or "") == ESTIMATORS[1] and values["mc_samples"] < 2:
        raise ScoreModeError(f"--mc-samples is 1; --estimator {estimator} needs at least 2")
    return Rule(name, values, estimator or ESTIMATORS[0], _options(options, choices))


def answer_format(options: Mapping[str, Any]) -> AnswerFormat:
    """The format that the options of problems describe."""
    named = {"answer_cue": "cue", "answer_end": "end"}
    return AnswerFormat(**{named[key]: options[key] for key in named if key in options})


def _options(given: Mapping[str, Any], choices: Sequence[Sequence[str]]) -> Options:
    found: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    found.setdefault("max_tokens_thinking", MAX_TOKENS_THINKING)
    for key in ("max_tokens_thinking", "thinking_n_ignore", "seed"):
        if found.get(key, 0) < 0:
            raise ScoreModeError(f"--{key.replace('_', '-')} is {found[key]}; it must be 0 or more")
    _check_choice("decide-at", found["decide_at"], DECIDE_AT)
    _check_choice("length-normalization", found["length_normalization"], LENGTH_NORMALIZATIONS)
    for key in ("answer_cue", "answer_end"):
        if key in found:
            found[key] = unescape(found[key])
    if found.get("answer_end") == END_OF_SEQUENCE:
        found["answer_end"] = None
    answer_format(found)
    if choices:
        found["candidates"] = [list(each) for each in choices]
    else:
        found.setdefault("candidates", "beam")
        candidate_source(found["candidates"])
    if not all(found.get("think_end", ["x"])):
        raise ScoreModeError("--think-end is ''; give the text that ends the reasoning")
    return cast(Options, found)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ScoreModeError(f"--{name} is {value!r}; it must be one of {', '.join(choices)}")
