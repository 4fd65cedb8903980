"""What a source of candidate answers is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.work import Steps
from vllm.score.errors import ScoreModeError


class NoCandidates(ScoreModeError):
    """A source found no answer; the message names it and the remedy."""


@dataclass(frozen=True)
class State:
    """A point of the reasoning.

    Attributes:
        token_ids: of the question and the reasoning.
        reasoning: the text of the reasoning so far.
    """

    token_ids: list[int]
    reasoning: str = ""


@runtime_checkable
class CandidateSource(Protocol):
    """Proposes answers; whether they are right, or likely, is for the scores to say."""

    def propose(
        self,
        state: State,
        count: int,
        format: AnswerFormat,
        tokenizer: Any,
        deadline: float | None,
    ) -> Steps[list[str]]:
        """From 1 to `count` distinct answers that fit the format, best or most frequent first.

        Raises:
            NoCandidates: there are none.
        """
        ...


def answer_of(text: str, format: AnswerFormat, tokenizer: Any) -> str | None:
    """The answer in a text that follows the cue: up to its end, stripped.

    None where it is blank, not made of whole characters, or cannot be scored: what a model writes
    need not be what its tokenizer would make of that text.
    """
    answer = (text.split(format.end, 1)[0] if format.end else text).strip()
    if "\ufffd" in answer or not format.encodes(tokenizer, answer):
        return None
    return answer


def unfinished(source: str, format: AnswerFormat, max_tokens: int) -> NoCandidates:
    """The error of a source whose answers did not come to an end."""
    end = "the end-of-sequence token" if format.end is None else f"the end {format.end!r}"
    return NoCandidates(
        f"{source} found no answer that comes to {end} within {max_tokens} tokens behind the cue "
        f"{format.cue!r}; use a larger max_tokens, a cue and an end that the model is used to, or "
        "give the answers."
    )


def check_at_least_one(**values: Any) -> None:
    """Refuse what is no whole number from 1 on, by name."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ScoreModeError(f"{name} is {value!r}; it must be a whole number from 1 on.")


def check_policy(temperature: float, top_p: float) -> None:
    """Refuse what no sampling policy has."""
    if not 0 <= temperature < float("inf"):
        raise ScoreModeError(f"temperature is {temperature}; it must be finite and at least 0.")
    if not 0 < top_p <= 1:
        raise ScoreModeError(f"top_p is {top_p}; it must be above 0 and at most 1.")
