"""Answers that the model gives when it is asked a few times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates.source import (
    State,
    answer_of,
    check_at_least_one,
    check_policy,
    unfinished,
)
from vllm.score.eig.work import Batch, Continuation, Sample, Steps


@dataclass(frozen=True)
class SampledCandidates:
    """Answers sampled behind the cue, the most frequent first, then in the order of the draws.

    Draws that do not come to their end are left out.

    Attributes:
        samples: number of draws; None: twice as many as answers are asked for.
        max_tokens: of an answer and its end.
        temperature, top_p: the sampling policy.

    Raises:
        ScoreModeError: a value out of range.
    """

    samples: int | None = None
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.samples is not None:
            check_at_least_one(samples=self.samples)
        check_at_least_one(max_tokens=self.max_tokens)
        check_policy(self.temperature, self.top_p)

    def propose(
        self,
        state: State,
        count: int,
        format: AnswerFormat,
        tokenizer: Any,
        deadline: float | None,
    ) -> Steps[list[str]]:
        """At most `count` answers.

        Raises:
            NoCandidates: no draw is an answer that comes to its end.
        """
        work = Sample(
            [*state.token_ids, *format.cue_tokens(tokenizer)],
            count=self.samples or 2 * count,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=(format.end,) if format.end else (),
        )
        (draws,) = yield Batch([work], deadline)
        answers = [answer_of(d.text, format, tokenizer) for d in draws if _ended(d, format)]
        found = Counter(answer for answer in answers if answer is not None).most_common(count)
        if not found:
            raise unfinished("SampledCandidates", format, self.max_tokens)
        return [answer for answer, _ in found]


def _ended(draw: Continuation, format: AnswerFormat) -> bool:
    return draw.finished or format.end == "" or bool(format.end and format.end in draw.text)
