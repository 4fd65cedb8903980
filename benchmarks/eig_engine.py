"""Decisions by expected information gain on an engine: one, many at once, and the same in bulk."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import string
from collections.abc import Sequence
from functools import partial
from typing import Any

import engines

CUE = ":"


class Decisions:
    """Decisions on an engine, and what they are about.

    Attributes:
        states: [concurrency, n] token ids.
        cue: token ids before an answer.
        answers: [A, m] token ids.
        equal_draws: continuations that were another one of their decision, over all rounds: a
            decision scores equal ones once.
    """

    def __init__(self, llm: Any, options: argparse.Namespace, vocab_size: int) -> None:
        from vllm.score.eig import (
            AnswerFormat,
            AnswerPosteriorEstimator,
            EngineDriver,
            ExpectedInformationGainCalculator,
            GivenCandidates,
            MonteCarloForecaster,
        )

        self.llm, self.options = llm, options
        self.equal_draws = 0
        self.states = engines.random_prompts(
            options.concurrency, options.context_length, vocab_size
        )
        self.driver = EngineDriver(llm, concurrency=options.concurrency)
        # The tokenizer makes a token of every letter, and one of the line's end.
        generator = random.Random(0)
        letters = options.answer_length - 1
        texts: dict[str, None] = {}
        while len(texts) < options.beam_size:
            texts["".join(generator.choices(string.ascii_lowercase, k=letters))] = None
        form = AnswerFormat(CUE, "\n")
        self.cue, self.answers = form.encode(self.driver.tokenizer, list(texts))
        if {len(a) for a in self.answers} != {options.answer_length} or len(self.cue) != len(CUE):
            raise SystemExit(f"the tokenizer makes {self.answers} of {list(texts)}")
        estimator = AnswerPosteriorEstimator(
            GivenCandidates(list(texts)),
            self.driver.tokenizer,
            beam_size=options.beam_size,
            answer_format=form,
        )
        forecaster = MonteCarloForecaster(
            estimator,
            mc_samples=options.mc_samples,
            sample_length=options.sample_length,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        # At no cost no decision ends before its forecasts.
        self.calculator = ExpectedInformationGainCalculator(
            forecaster, lambda_cost=0.0, max_computation_time=None
        )

    def one(self) -> list[Any]:
        """A decision at the first state."""
        from vllm.score.eig import State

        self.llm.reset_prefix_cache()
        return [asyncio.run(self.calculator.decide(self.driver, State(self.states[0])))]

    def all(self) -> list[Any]:
        """A decision at every state, side by side."""
        from vllm.score.eig import State

        self.llm.reset_prefix_cache()
        problems = (partial(self.calculator.decide, state=State(ids)) for ids in self.states)
        return [decision for _, decision in sorted(self.driver.run_all(problems))]

    def bulk(self) -> tuple[list[Any], list[list[list[int]]]]:
        """The same work in two calls: scores, those of the states first, and continuations."""
        from vllm import SamplingParams
        from vllm.score import score

        options = self.options
        params = SamplingParams(
            n=options.mc_samples,
            max_tokens=options.sample_length,
            temperature=options.temperature,
            top_p=options.top_p,
        )
        self.llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": ids} for ids in self.states]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        drawn = [[list(o.token_ids) for o in output.outputs] for output in outputs]
        pairs = zip(self.states, drawn, strict=True)
        later = [[*ids, *tokens] for ids, group in pairs for tokens in group]
        requests = [
            {"prompt_token_ids": [*ids, *self.cue, *a], "target_token_ids": a}
            for ids, a in itertools.product([*self.states, *later], self.answers)
        ]
        return score(self.llm, requests, use_tqdm=False), drawn

    def checked(self, decisions: Sequence[Any]) -> list[Any]:
        """The decisions; each has all of its forecasts, of the full length."""
        for decision in decisions:
            if decision.failure is not None or decision.forecast is None:
                raise SystemExit(f"a decision failed or made no forecast: {decision}")
            self.check_draws([c.token_ids for c in decision.forecast.continuations])
        return list(decisions)

    def check_draws(self, drawn: Sequence[Sequence[int]]) -> None:
        """Equal work has equally many tokens."""
        lengths = [len(ids) for ids in drawn]
        if lengths != [self.options.sample_length] * self.options.mc_samples:
            raise SystemExit(f"continuations of {lengths} tokens")
        self.equal_draws += len(drawn) - len({tuple(ids) for ids in drawn})
