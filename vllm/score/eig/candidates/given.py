"""Answers known beforehand, as those of a multiple-choice question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates.source import State
from vllm.score.eig.work import Steps
from vllm.score.errors import ScoreModeError


@dataclass(frozen=True)
class GivenCandidates:
    """The same answers at every state, in the order given.

    Attributes:
        answers: distinct texts, at least one.

    Raises:
        ScoreModeError: there are none, or one is blank, no text, or given twice.
    """

    answers: Sequence[str]

    def __post_init__(self) -> None:
        if isinstance(self.answers, str) or not self.answers:
            raise ScoreModeError(
                f"answers is {self.answers!r}; give a list of at least one answer."
            )
        for answer in self.answers:
            if not isinstance(answer, str) or not answer.strip():
                raise ScoreModeError(
                    f"answers: {answer!r} is no answer; give texts that are not blank."
                )
        if len(set(self.answers)) < len(self.answers):
            raise ScoreModeError(f"answers has the same text twice: {list(self.answers)!r}.")

    def propose(
        self,
        state: State,
        count: int,
        format: AnswerFormat,
        tokenizer: Any,
        deadline: float | None,
    ) -> Steps[list[str]]:
        """All answers.

        Raises:
            ScoreModeError: there are more than `count`: none of those given is left out unsaid.
        """
        yield from ()
        self.check_count(count)
        return list(self.answers)

    def check_count(self, count: int) -> None:
        """Raise ScoreModeError where there are more answers than `count`."""
        if len(self.answers) > count:
            raise ScoreModeError(
                f"{len(self.answers)} answers are given, but beam_size is {count}; raise beam_size "
                "or give fewer answers."
            )
