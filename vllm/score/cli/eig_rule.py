"""The rule and the settings that `vllm-score eig` runs with, checked before any engine."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.score.cli.questions import Questions
from vllm.score.eig.candidates import candidate_source
from vllm.score.eig.options import Options
from vllm.score.eig.reasoning import ANSWER_ROOM, MAX_TOKENS_THINKING
from vllm.score.eig.rules import StoppingRule, find_rule
from vllm.score.errors import ScoreModeError
from vllm.score.escapes import unescape

END_OF_SEQUENCE = "EOS"


def make_rule(
    name: str, given: Mapping[str, Any], *, strict: bool, choices: Sequence[Sequence[str]]
) -> StoppingRule:
    """From options as they are given, None where they are not.

    Args:
        name: of the scaler.
        given: parameters of scalers.
        choices: candidate answers of each question; empty where there are none.

    Raises:
        ScoreModeError: for options out of range or that do not go together.
    """
    kind = find_rule(name)
    own, foreign = kind.split({key: value for key, value in given.items() if value is not None})
    for key, value in foreign.items():
        raise ScoreModeError(
            f"--{key.replace('_', '-')} is {value!r}, which {name} does not take; leave it out"
        )
    if choices:
        most = max(map(len, choices))
        own.setdefault("beam_size", most)
        _, high = kind.parameters()["beam_size"].bounds
        if most > min(own["beam_size"], high):
            raise ScoreModeError(
                f"a question has {most} choices, more than --beam-size {own['beam_size']} (at "
                f"most {high}); raise it or give fewer"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its record in the log is enough
        return kind.checked(strict, **own)


def make_options(given: Mapping[str, Any], choices: Sequence[Sequence[str]]) -> Options:
    """From options as they are given, None where they are not; texts with escapes.

    Raises:
        ScoreModeError: for options that cannot be used.
    """
    found: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key in ("answer_cue", "answer_end"):
        if key in found:
            found[key] = unescape(found[key])
    if found.get("answer_end") == END_OF_SEQUENCE:
        found["answer_end"] = None
    if choices:
        if "candidates" in found:
            raise ScoreModeError(
                "--candidates and --choices-column each name candidates; give one of them"
            )
        found["candidates"] = [list(each) for each in choices]
    else:
        candidate_source(found.get("candidates", "beam"))
    if not all(found.get("think_end", ["x"])):
        raise ScoreModeError("--think-end is ''; give the text that ends the reasoning")
    return Options(**found)


def room(rule: StoppingRule, options: Options) -> int:
    """Tokens that a question needs behind it at most."""
    most = rule.budget(options.max_tokens_thinking)
    return (MAX_TOKENS_THINKING if most is None else most) + rule.sample_length + ANSWER_ROOM


def check_choices(questions: Questions, options: Options, tokenizer: Any) -> None:
    """Choices that can be scored.

    Raises:
        ScoreModeError: named by their row.
    """
    for choices, name in zip(questions.choices, questions.names, strict=False):
        try:
            candidate_source(choices)
            options.answer_format.encode(tokenizer, choices)
        except ScoreModeError as error:
            raise ScoreModeError(f"{name}: {error}") from error
