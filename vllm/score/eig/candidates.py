"""Where candidate answers come from: beams, samples, the reasoning itself, or the caller."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Protocol, get_type_hints, runtime_checkable

from pydantic import Field

from vllm.score.checks import Count, Fraction, Number, check, check_name
from vllm.score.eig.answers import (
    AnswerFormat,
    Found,
    check_answers,
    find_boxed,
    find_numbers,
    find_pattern,
    normalise,
)
from vllm.score.eig.records import MAX_TOP, Batch, Continuation, Next, Reasoner, Sample
from vllm.score.errors import ScoreModeError

KINDS = ("numeric", "boxed")
_Temperature = Annotated[Number, Field(ge=0)]


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

    async def propose(
        self, reasoner: Reasoner, state: State, count: int, form: AnswerFormat
    ) -> list[str]:
        """From 1 to `count` distinct answers that fit the format, best or most frequent first.

        Raises:
            NoCandidates: there are none.
        """
        ...


class _Hypothesis(NamedTuple):
    """Tokens behind the cue and the sum of their losses, in nats; the likelier sorts first."""

    loss: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class _Checked:
    """A source whose fields are checked when it is made, each by its annotation."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self), include_extras=True).items():
            check(name, getattr(self, name), kind)


@dataclass(frozen=True)
class BeamCandidates(_Checked):
    """Beam search behind the cue, with the model's own log-probabilities.

    A hypothesis is complete where its text holds the format's end, or its last token is a special
    token (such as that of the end of the sequence), or, with end="", where it has `max_tokens`.
    Each step makes one batch of the live hypotheses, at most as many as answers are asked for.
    From the best twice as many extensions the complete ones leave the beam, as usual (so that
    they do not narrow it). Ranks are by log-probability, end included, without normalisation;
    equals are ordered by their token ids, so the same scores always give the same answers. Of
    hypotheses with the same text the likeliest counts. The search stops where no live hypothesis
    can overtake what is found. Where the beam holds all hypotheses the result is exact.

    Attributes:
        max_tokens: of an answer and its end.

    Raises:
        ScoreModeError: `max_tokens` is no whole number from 1 on.
    """

    max_tokens: Count = 16

    async def propose(
        self, reasoner: Reasoner, state: State, count: int, form: AnswerFormat
    ) -> list[str]:
        """At most `count` answers, the likeliest first.

        Raises:
            NoCandidates: none is complete.
        """
        tokenizer = reasoner.tokenizer
        context = [*state.token_ids, *form.cue_tokens(tokenizer)]
        top = min(2 * count, MAX_TOP, len(tokenizer))
        end = getattr(tokenizer, "eos_token_id", None)
        special = {*getattr(tokenizer, "all_special_ids", ()), end}
        live = [_Hypothesis(0.0, ())]
        found: dict[str, _Hypothesis] = {}
        for length in range(1, self.max_tokens + 1):
            work = [Next([*context, *hypothesis.tokens], top) for hypothesis in live]
            results = await reasoner.run(Batch(work))
            extended = [
                _Hypothesis(before.loss - float(logprob), (*before.tokens, int(token)))
                for before, (tokens, logprobs) in zip(live, results, strict=True)
                for token, logprob in zip(tokens, logprobs, strict=True)
                if logprob > -float("inf")
            ]
            live = []
            last = form.end == "" and length == self.max_tokens
            for hypothesis in sorted(extended)[: 2 * count]:
                ended = hypothesis.tokens[-1] in special
                tokens = hypothesis.tokens[:-1] if ended else hypothesis.tokens
                text = tokenizer.decode(list(tokens), skip_special_tokens=False) if tokens else ""
                if ended or last or (form.end and form.end in text):
                    answer = _answer_of(text, form, tokenizer)
                    if answer is not None:
                        found[answer] = min(found.get(answer, hypothesis), hypothesis)
                elif len(live) < count:
                    live.append(hypothesis)
            best = sorted(found, key=found.__getitem__)[:count]
            if not live or (len(best) == count and found[best[-1]].loss <= live[0].loss):
                break
        if not found:
            raise _unfinished("BeamCandidates", form, self.max_tokens)
        return best


@dataclass(frozen=True)
class SampledCandidates(_Checked):
    """Answers sampled behind the cue, the most frequent first, then in the order of the draws.

    Draws that do not come to their end are left out.

    Attributes:
        samples: number of draws; None: twice as many as answers are asked for.
        max_tokens: of an answer and its end.
        temperature, top_p: the sampling policy.

    Raises:
        ScoreModeError: a value out of range.
    """

    samples: Count | None = None
    max_tokens: Count = 16
    temperature: _Temperature = 1.0
    top_p: Fraction = 1.0

    async def propose(
        self, reasoner: Reasoner, state: State, count: int, form: AnswerFormat
    ) -> list[str]:
        """At most `count` answers.

        Raises:
            NoCandidates: no draw is an answer that comes to its end.
        """
        tokenizer = reasoner.tokenizer
        work = Sample(
            [*state.token_ids, *form.cue_tokens(tokenizer)],
            count=self.samples or 2 * count,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stop=(form.end,) if form.end else (),
        )
        (draws,) = await reasoner.run(Batch([work]))
        complete = [d for d in draws if d.finished or (form.end is not None and form.end in d.text)]
        answers = [_answer_of(draw.text, form, tokenizer) for draw in complete]
        found = Counter(answer for answer in answers if answer is not None).most_common(count)
        if not found:
            raise _unfinished("SampledCandidates", form, self.max_tokens)
        return [answer for answer, _ in found]


@dataclass(frozen=True)
class GivenCandidates:
    """Answers known beforehand, e.g. those of a multiple-choice question: always the same.

    Attributes:
        answers: distinct texts, at least one.

    Raises:
        ScoreModeError: there are none, or one is blank, no text, or given twice.
    """

    answers: Sequence[str]

    def __post_init__(self) -> None:
        check_answers(self.answers)

    async def propose(
        self, reasoner: Reasoner, state: State, count: int, form: AnswerFormat
    ) -> list[str]:
        """All answers, in the order given.

        Raises:
            ScoreModeError: there are more than `count`: none of those given is left out unsaid.
        """
        self.check_count(count)
        return list(self.answers)

    def check_count(self, count: int) -> None:
        """Raise ScoreModeError where there are more answers than `count`."""
        if len(self.answers) > count:
            raise ScoreModeError(
                f"{len(self.answers)} answers are given, but beam_size is {count}; raise beam_size "
                "or give fewer answers."
            )


@dataclass(frozen=True)
class ExtractedCandidates(_Checked):
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

    kind: Any = "numeric"
    samples: Count = 4
    sample_length: Count = 128
    temperature: _Temperature = 1.0
    top_p: Fraction = 1.0
    fallback: CandidateSource | None = field(default_factory=BeamCandidates)

    def __post_init__(self) -> None:
        textual = isinstance(self.kind, re.Pattern) and isinstance(self.kind.pattern, str)
        if not textual and self.kind not in KINDS:
            raise ScoreModeError(
                f"kind is {self.kind!r}; it must be 'numeric', 'boxed' or a compiled regular "
                "expression, re.compile(...), over texts."
            )
        super().__post_init__()

    async def propose(
        self, reasoner: Reasoner, state: State, count: int, form: AnswerFormat
    ) -> list[str]:
        """At most `count` answers.

        Raises:
            NoCandidates: nothing is found, and nothing by the fallback.
        """
        work = Sample(
            state.token_ids, self.samples, self.sample_length, self.temperature, self.top_p
        )
        (draws,) = await reasoner.run(Batch([work]))
        ranked = self._ranked(state.reasoning, draws)
        answers = [a for a in ranked if form.encodes(reasoner.tokenizer, a)][:count]
        if len(answers) < 2 and self.fallback is not None:
            try:
                more = await self.fallback.propose(reasoner, state, count, form)
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


CANDIDATE_SOURCES: dict[str, Callable[[], CandidateSource]] = {
    "beam": BeamCandidates,
    "sampled": SampledCandidates,
    "numeric": lambda: ExtractedCandidates("numeric"),
    "boxed": lambda: ExtractedCandidates("boxed"),
}


def candidate_source(
    source: str | Sequence[str] | re.Pattern[str] | CandidateSource,
) -> CandidateSource:
    """A source from its name ("beam", "sampled", "numeric" or "boxed"), from a list of answers, or
    from a compiled regular expression; a source is returned as it is.

    Raises:
        ScoreModeError: for anything else.
    """
    if isinstance(source, str):
        if source == "given":
            raise ScoreModeError(
                "candidates is 'given', but no answers are; pass the list of answers itself."
            )
        check_name("candidates", source, CANDIDATE_SOURCES)
        return CANDIDATE_SOURCES[source]()
    if isinstance(source, re.Pattern):
        return ExtractedCandidates(source)
    if isinstance(source, Sequence):
        return GivenCandidates(list(source))
    if isinstance(source, CandidateSource) and not isinstance(source, type):
        return source
    raise ScoreModeError(
        f"candidates is {source!r}; give one of {', '.join(CANDIDATE_SOURCES)}, a list of answers, "
        "or a CandidateSource."
    )


def _answer_of(text: str, form: AnswerFormat, tokenizer: Any) -> str | None:
    """The answer in a text that follows the cue: up to its end, stripped.

    None where it is blank, not made of whole characters, or cannot be scored: what a model writes
    need not be what its tokenizer would make of that text.
    """
    answer = (text.split(form.end, 1)[0] if form.end else text).strip()
    return answer if "\ufffd" not in answer and form.encodes(tokenizer, answer) else None


def _unfinished(source: str, form: AnswerFormat, max_tokens: int) -> NoCandidates:
    """The error of a source whose answers did not come to an end."""
    end = "the end-of-sequence token" if form.end is None else f"the end {form.end!r}"
    return NoCandidates(
        f"{source} found no answer that comes to {end} within {max_tokens} tokens behind the cue "
        f"{form.cue!r}; use a larger max_tokens, a cue and an end that the model is used to, or "
        "give the answers."
    )
