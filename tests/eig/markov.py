"""A reasoner whose posterior and expected information gain are known exactly.

The answer A is drawn from a prior; reasoning is a Markov chain whose transition matrix depends on
A. The model knows all of this and nothing else: its next token has the probability

    p(x | h) = sum_a p(a | h) T_a[last, x],    p(a | h) proportional to prior(a) prod T_a[.., ..],

so its posteriors are coherent: they average to the one that it has now.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm.score.eig.records import Batch, Continuation, Next, Sample, Score


class ChainTokenizer:
    """Token i is the letter i; answers are the capital letters behind them, "." ends one."""

    eos_token_id: int | None = None

    def __init__(self, states: int, answers: int) -> None:
        self.alphabet = "".join(chr(97 + i) for i in range(states))
        self.alphabet += "".join(chr(65 + i) for i in range(answers)) + "?.!"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.alphabet[i] for i in ids)


class MarkovReasoner:
    """Exact scores and exact draws, behind the interface of `Reasoner`.

    Args:
        prior: [A].
        transitions: [A, S, S], rows summing to 1.
        seed: of the draws.
        ends_after: tokens after which the reasoner wants to end its reasoning.
    """

    def __init__(
        self,
        prior: np.ndarray,
        transitions: np.ndarray,
        seed: int = 0,
        ends_after: int | None = None,
    ) -> None:
        self.prior, self.transitions, self.ends_after = prior, transitions, ends_after
        self.states, self.answers = transitions.shape[1], len(prior)
        self.tokenizer: Any = ChainTokenizer(self.states, self.answers)
        self.random = np.random.default_rng(seed)
        self.batches: list[Batch] = []

    @property
    def names(self) -> list[str]:
        return [chr(65 + i) for i in range(self.answers)]

    def log_weights(self, chain: Sequence[int]) -> np.ndarray:
        """log p(a, chain) up to a constant, [A]."""
        logs = np.log(self.prior)
        for before, after in itertools.pairwise(chain):
            logs = logs + np.log(self.transitions[:, before, after])
        return logs

    def posterior(self, chain: Sequence[int]) -> np.ndarray:
        """p(a | chain), [A]."""
        logs = self.log_weights(chain)
        weights = np.exp(logs - logs.max())
        return weights / weights.sum()

    def next_probabilities(self, chain: Sequence[int]) -> np.ndarray:
        """p(x | chain), [S]."""
        return self.posterior(chain) @ self.transitions[:, chain[-1]]

    def entropy(self, chain: Sequence[int]) -> float:
        p = self.posterior(chain)
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())

    def gain(self, chain: Sequence[int], length: int) -> tuple[float, float]:
        """Exact EIG of `length` more tokens, and the standard deviation of H_{t+1}.

        By enumeration of all S**length continuations.
        """
        probabilities, entropies = [], []
        for path in itertools.product(range(self.states), repeat=length):
            log_joint = self.log_weights([*chain, *path])
            before = self.log_weights(chain)
            probabilities.append(np.exp(log_joint).sum() / np.exp(before).sum())
            entropies.append(self.entropy([*chain, *path]))
        p, h = np.array(probabilities), np.array(entropies)
        assert abs(p.sum() - 1) < 1e-12
        mean = float(p @ h)
        return self.entropy(chain) - mean, float(np.sqrt(p @ (h - mean) ** 2))

    async def run(self, batch: Batch) -> list[Any]:
        self.batches.append(batch)
        return [self._do(work) for work in batch.work]

    def _do(self, work: Any) -> Any:
        if isinstance(work, Sample):
            return [self._draw(work) for _ in range(work.count)]
        if isinstance(work, Score):
            return [self._score(work.context, target) for target in work.targets]
        assert isinstance(work, Next)
        raise NotImplementedError("the answers are given")

    def _draw(self, work: Sample) -> Continuation:
        assert work.temperature == 1.0 and work.top_p == 1.0, "only exact draws are made here"
        drawn: list[int] = []
        while len(drawn) < work.max_tokens:
            if self.ends_after is not None and len(work.context) + len(drawn) >= self.ends_after:
                return Continuation(drawn, self.tokenizer.decode(drawn), True)
            p = self.next_probabilities([*work.context, *drawn])
            drawn.append(int(self.random.choice(self.states, p=p)))
        return Continuation(drawn, self.tokenizer.decode(drawn), False)

    def _score(self, context: Sequence[int], target: Sequence[int]) -> np.ndarray:
        """Behind the cue "?", answer a has the probability p(a | chain); its end is certain."""
        assert self.tokenizer.decode(context[-1:]) == "?"
        answer, end = target
        assert self.tokenizer.decode([end]) == "."
        return np.log([self.posterior(context[:-1])[answer - self.states], 1.0]).astype(np.float32)


def random_reasoner(
    answers: int, states: int, seed: int, sharpness: float = 1.0, ends_after: int | None = None
) -> MarkovReasoner:
    """One with Dirichlet(1 / sharpness) transitions and prior."""
    random = np.random.default_rng(seed)
    prior = random.dirichlet(np.full(answers, 2.0))
    alpha = np.full(states, 1.0 / sharpness)
    transitions = random.dirichlet(alpha, size=(answers, states)) * 0.98 + 0.02 / states
    return MarkovReasoner(prior, transitions, seed, ends_after)
