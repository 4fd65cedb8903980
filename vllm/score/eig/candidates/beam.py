"""The model's likeliest answers, by beam search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates.source import State, answer_of, check_at_least_one, unfinished
from vllm.score.eig.work import Batch, Next, Steps

# As many next tokens as `Next` gives.
_MOST = 20


class _Hypothesis(NamedTuple):
    """Tokens behind the cue and the sum of their log-probabilities, in nats."""

    tokens: tuple[int, ...]
    logprob: float


@dataclass(frozen=True)
class BeamCandidates:
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

    max_tokens: int = 16

    def __post_init__(self) -> None:
        check_at_least_one(max_tokens=self.max_tokens)

    def propose(
        self,
        state: State,
        count: int,
        format: AnswerFormat,
        tokenizer: Any,
        deadline: float | None,
    ) -> Steps[list[str]]:
        """At most `count` answers, the likeliest first.

        Raises:
            NoCandidates: none is complete.
        """
        context = [*state.token_ids, *format.cue_tokens(tokenizer)]
        top = min(2 * count, _MOST, len(tokenizer))
        special = _special_tokens(tokenizer)
        live = [_Hypothesis((), 0.0)]
        found: dict[str, _Hypothesis] = {}
        for length in range(1, self.max_tokens + 1):
            work = [Next([*context, *hypothesis.tokens], top) for hypothesis in live]
            results = yield Batch(work, deadline)
            extended = [
                _Hypothesis((*before.tokens, int(token)), before.logprob + float(logprob))
                for before, (tokens, logprobs) in zip(live, results, strict=True)
                for token, logprob in zip(tokens, logprobs, strict=True)
                if logprob > -float("inf")
            ]
            live = []
            last = format.end == "" and length == self.max_tokens
            for hypothesis in sorted(extended, key=_rank)[: 2 * count]:
                ended = hypothesis.tokens[-1] in special
                tokens = hypothesis.tokens[:-1] if ended else hypothesis.tokens
                text = tokenizer.decode(list(tokens), skip_special_tokens=False) if tokens else ""
                if ended or last or (format.end and format.end in text):
                    _keep(found, answer_of(text, format, tokenizer), hypothesis)
                elif len(live) < count:
                    live.append(hypothesis)
            best = sorted(found.values(), key=_rank)[:count]
            if not live or (len(best) == count and best[-1].logprob >= live[0].logprob):
                break
        if not found:
            raise unfinished("BeamCandidates", format, self.max_tokens)
        return sorted(found, key=lambda answer: _rank(found[answer]))[:count]


def _rank(hypothesis: _Hypothesis) -> tuple[float, tuple[int, ...]]:
    return -hypothesis.logprob, hypothesis.tokens


def _keep(found: dict[str, _Hypothesis], answer: str | None, hypothesis: _Hypothesis) -> None:
    if answer is not None:
        found[answer] = min(found.get(answer, hypothesis), hypothesis, key=_rank)


def _special_tokens(tokenizer: Any) -> set[int]:
    tokens = {*getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "eos_token_id", None)}
    return {int(token) for token in tokens if token is not None}
