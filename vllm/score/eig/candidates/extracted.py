"""Answers that stand in the reasoning and in what may follow it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates.beam import BeamCandidates
from vllm.score.eig.candidates.extract import (
    Found,
    find_boxed,
    find_numbers,
    find_pattern,
    normalise,
)
from vllm.score.eig.candidates.source import (
    CandidateSource,
    NoCandidates,
    State,
    check_at_least_one,
    check_policy,
)
from vllm.score.eig.work import Batch, Continuation, Sample, Steps
from vllm.score.errors import ScoreModeError

KINDS = ("numeric", "boxed")


@dataclass(frozen=True)
class ExtractedCandidates:
    """Answers found in the reasoning so far and in sampled continuations of it.

    First those that are the last ones of most continued texts, then the most frequent, then the
    first seen: intermediate results are frequent too, but the last one is rather the answer. One at
    the end of a text that was cut off may lack digits and does not count. Answers are normalised,
    so those that differ in their writing only are counted together.

    Attributes:
        kind: "numeric", "boxed", or a compiled regular expression, whose first group (or, without
            groups, whose match) is the answer.
        samples: number of continuations.
        sample_length: tokens of each at most.
        temperature, top_p: the sampling policy.
        fallback: where fewer than two answers are found, its answers follow; None: nothing does.

    Raises:
        ScoreModeError: an unknown kind, or a value out of range.
    """

    kind: str | re.Pattern[str] = "numeric"
    samples: int = 4
    sample_length: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    fallback: CandidateSource | None = field(default_factory=BeamCandidates)

    def __post_init__(self) -> None:
        textual = isinstance(self.kind, re.Pattern) and isinstance(self.kind.pattern, str)
        if not textual and self.kind not in KINDS:
            raise ScoreModeError(
                f"kind is {self.kind!r}; it must be 'numeric', 'boxed' or a compiled regular "
                "expression, re.compile(...), over texts."
            )
        check_at_least_one(samples=self.samples, sample_length=self.sample_length)
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
            NoCandidates: nothing is found, and nothing by the fallback.
        """
        work = Sample(
            state.token_ids, self.samples, self.sample_length, self.temperature, self.top_p
        )
        (draws,) = yield Batch([work], deadline)
        ranked = self._ranked(state.reasoning, draws)
        answers = [a for a in ranked if format.encodes(tokenizer, a)][:count]
        if len(answers) < 2 and self.fallback is not None:
            try:
                more = yield from self.fallback.propose(state, count, format, tokenizer, deadline)
            except NoCandidates:
                if not answers:
                    raise
                more = []
            known = {normalise(answer) for answer in answers}
            answers += [answer for answer in more if normalise(answer) not in known]
        if not answers:
            raise NoCandidates(
                f"ExtractedCandidates found no answer of kind {self.kind!r} in the reasoning or in "
                f"{self.samples} continuations of {self.sample_length} tokens; use more or longer "
                "ones, or a fallback."
            )
        return answers[:count]

    def _ranked(self, reasoning: str, draws: list[Continuation]) -> list[str]:
        settled = [found for found in self._find(reasoning) if not found.open]
        start = settled[-1].end if settled else 0
        total = Counter(found.answer for found in settled)
        last: Counter[str] = Counter()
        for draw in draws:
            # Together: a number may begin in the reasoning and end in the continuation.
            found = self._find(reasoning + draw.text)
            found = [f for f in found if draw.finished or not f.open]
            last.update(f.answer for f in found[-1:])
            total.update(f.answer for f in found if f.end > start)
        return sorted(total, key=lambda answer: (-last[answer], -total[answer]))

    def _find(self, text: str) -> list[Found]:
        if isinstance(self.kind, re.Pattern):
            return find_pattern(text, self.kind)
        return find_numbers(text) if self.kind == "numeric" else find_boxed(text)
