"""The posterior of the answer at a state of the reasoning, and what it may be after a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from vllm.score.checks import check_name
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import CandidateSource, State
from vllm.score.eig.entropy import LENGTH_NORMALIZATIONS, entropy, log_posterior
from vllm.score.eig.reasoner import Batch, Continuation, Reasoner, Sample, Score
from vllm.score.eig.trace import AnswerPosterior, Forecast


class AnswerPosteriorEstimator:
    """P_t over candidate answers, from exact log-probabilities.

    Args:
        candidates: proposes answers at a state.
        tokenizer: the model's.
        beam_size: number of candidates at most.
        answer_format: what comes before and after an answer.
        length_normalization: "none": the model's own distribution over the candidates; "tokens",
            "bytes": each log-probability divided by that length of the answer and its end, as
            multiple-choice accuracies are often normalised.

    Raises:
        ScoreModeError: an unknown normalisation.
    """

    def __init__(
        self,
        candidates: CandidateSource,
        tokenizer: Any,
        *,
        beam_size: int = 8,
        answer_format: AnswerFormat | None = None,
        length_normalization: str = "none",
    ) -> None:
        check_name("length_normalization", length_normalization, LENGTH_NORMALIZATIONS)
        self.candidates, self.tokenizer, self.beam_size = candidates, tokenizer, beam_size
        self.answer_format = answer_format or AnswerFormat()
        self.length_normalization = length_normalization
        # The same candidates count before and after a step.
        self._encode = lru_cache(maxsize=4)(partial(self.answer_format.encode, tokenizer))

    async def estimate(self, reasoner: Reasoner, state: State) -> AnswerPosterior:
        """Propose candidates at a state and return their posterior."""
        return await self.posterior(reasoner, state, await self.propose(reasoner, state))

    async def propose(self, reasoner: Reasoner, state: State) -> list[str]:
        """At most `beam_size` candidates."""
        return await self.candidates.propose(reasoner, state, self.beam_size, self.answer_format)

    async def posterior(
        self, reasoner: Reasoner, state: State, answers: Sequence[str]
    ) -> AnswerPosterior:
        """The posterior over the likeliest `beam_size` of the answers."""
        cue, targets = self._encode(tuple(answers))
        (scores,) = await reasoner.run(Batch([Score([*state.token_ids, *cue], targets)]))
        posterior = self._posterior(answers, targets, scores)
        if len(answers) <= self.beam_size:
            return posterior
        best = np.argsort(-posterior.log_posterior, kind="stable")[: self.beam_size]
        kept = sorted(best.tolist())
        return self._posterior(
            [answers[i] for i in kept], [targets[i] for i in kept], [scores[i] for i in kept]
        )

    async def after(
        self, reasoner: Reasoner, contexts: Sequence[Sequence[int]], answers: Sequence[str]
    ) -> list[AnswerPosterior]:
        """The posteriors over all the answers after each context; equal contexts count once."""
        cue, targets = self._encode(tuple(answers))
        distinct = list(dict.fromkeys(map(tuple, contexts)))
        work = [Score([*context, *cue], targets) for context in distinct]
        results = dict(zip(distinct, await reasoner.run(Batch(work)), strict=True))
        return [self._posterior(answers, targets, results[tuple(c)]) for c in contexts]

    def _posterior(
        self,
        answers: Sequence[str],
        targets: Sequence[Sequence[int]],
        scores: Sequence[np.ndarray],
    ) -> AnswerPosterior:
        logprobs = np.array([np.sum(values, dtype=np.float64) for values in scores])
        logs = log_posterior(logprobs, self._lengths(answers, targets))
        return AnswerPosterior(
            list(answers), logprobs, logs, float(entropy(logs)), float(np.exp(logprobs).sum())
        )

    def _lengths(
        self, answers: Sequence[str], targets: Sequence[Sequence[int]]
    ) -> np.ndarray | None:
        if self.length_normalization == "none":
            return None
        if self.length_normalization == "tokens":
            return np.array([len(target) for target in targets])
        end = self.answer_format.end or ""
        return np.array([len((answer + end).encode()) for answer in answers])


class MonteCarloForecaster:
    """E[H_{t+1}], from continuations that the model itself writes.

    Args:
        estimator: of the posteriors.
        mc_samples: K.
        sample_length: tokens of a continuation at most.
        temperature, top_p: the policy under which reasoning goes on.
        stop: texts that end the reasoning, e.g. "</think>".
    """

    def __init__(
        self,
        estimator: AnswerPosteriorEstimator,
        *,
        mc_samples: int = 5,
        sample_length: int = 64,
        temperature: float = 1.0,
        top_p: float = 0.9,
        stop: Sequence[str] = (),
    ) -> None:
        self.estimator, self.mc_samples, self.sample_length = estimator, mc_samples, sample_length
        self.temperature, self.top_p, self.stop = temperature, top_p, tuple(stop)

    async def forecast(
        self,
        reasoner: Reasoner,
        state: State,
        answers: Sequence[str],
        bridge: Sequence[int] = (),
    ) -> Forecast:
        """Sample continuations of a state and return the posteriors after them."""
        context = [*state.token_ids, *bridge]
        drawn = await self.draw(reasoner, context, self.mc_samples)
        return await self.score(reasoner, context, answers, drawn)

    async def draw(
        self,
        reasoner: Reasoner,
        context: Sequence[int],
        count: int,
        max_tokens: int | None = None,
    ) -> list[Continuation]:
        """`count` continuations of a context, without the text that ended them."""
        length = self.sample_length if max_tokens is None else max_tokens
        work = Sample(context, count, length, self.temperature, self.top_p, self.stop)
        (drawn,) = await reasoner.run(Batch([work]))
        return [without_stop(each, self.stop, self.estimator.tokenizer) for each in drawn]

    async def score(
        self,
        reasoner: Reasoner,
        context: Sequence[int],
        answers: Sequence[str],
        drawn: Sequence[Continuation],
    ) -> Forecast:
        """The posteriors after each continuation of a context, all in one batch."""
        contexts = [[*context, *each.token_ids] for each in drawn]
        posteriors = await self.estimator.after(reasoner, contexts, answers)
        logs = np.stack([posterior.log_posterior for posterior in posteriors])
        return Forecast(list(drawn), logs, entropy(logs))


def without_stop(drawn: Continuation, stop: Sequence[str], tokenizer: Any) -> Continuation:
    """The continuation without the text that ended it, and the tokens that hold it."""
    if not drawn.finished or not any(text in drawn.text for text in stop):
        return drawn
    ids, text = list(drawn.token_ids), drawn.text
    while ids and any(mark in text for mark in stop):
        ids.pop()
        text = tokenizer.decode(ids)
    return Continuation(ids, text, True)
