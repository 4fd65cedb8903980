"""Sums over the scored tokens of one plan, in one pass and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm.score.perplexity.bootstrap import BlockBootstrap
from vllm.score.perplexity.measures import TextCounter, check_logprobs
from vllm.score.perplexity.plans import ScoringPlan
from vllm.score.perplexity.stream import Window
from vllm.score.perplexity.windows import SlidingWindows


@dataclass(frozen=True)
class GuideMeans:
    """Mean losses with the weights of the Hugging Face guide, nats a token.

    current: window means weighted by targets - 1 (all targets where the window's first token is
        unscored). until_2024: the plain mean of the window means.
    """

    current: float
    until_2024: float


class PlanTotals:
    """Adds up groups of windows in their order.

    Attributes:
        tokens, windows: scored so far.
        text: words and bytes of the scored tokens; None where the plan leaves gaps or the
            characters are not known.
        losses: the block bootstrap of the tokens' losses, nats.
    """

    def __init__(self, plan: ScoringPlan) -> None:
        self.tokens = 0
        self.windows = 0
        self.text = TextCounter() if plan.windows.covers_everything else None
        self.losses = BlockBootstrap()
        self._overlapping = (
            isinstance(plan.windows, SlidingWindows)
            and plan.windows.stride < plan.windows.context_length
        )
        self._sums: list[float] = []
        self._document: int | None = None
        self._guide_loss = self._guide_weight = self._sum_of_means = 0.0

    def add(self, windows: Sequence[Window], logprobs: np.ndarray) -> None:
        """The next group.

        Args:
            windows: of the group.
            logprobs: float32 [sum of the windows' targets], nats, in their order.

        Raises:
            ScoreModeError: for a value that is no log-probability.
        """
        check_logprobs(logprobs, f"logprobs of windows {windows[0].index} to {windows[-1].index}")
        losses = -logprobs.astype(np.float64)
        self.losses.add(losses)
        self._sums.append(float(losses.sum()))
        self.tokens += losses.size
        self.windows += len(windows)
        starts = np.cumsum([0, *(w.num_targets for w in windows)])[:-1]
        for window, total in zip(windows, np.add.reduceat(losses, starts).tolist(), strict=True):
            # The guide takes one off everywhere for the label that the shift loses; one is lost
            # only where the targets begin with the window, and is not in num_targets then.
            lost = window.index == 0 or not self._overlapping
            weight = window.num_targets - (0 if lost else 1)
            mean = total / window.num_targets
            self._guide_loss += mean * weight
            self._guide_weight += weight
            self._sum_of_means += mean
            self._count_text(window)

    def finish(self, documents: int) -> None:
        """After the last group: the text had so many documents, empty ones included."""
        if self.text is not None:
            self.text.documents = documents

    @property
    def loss(self) -> float:
        """Sum of the losses, nats."""
        return math.fsum(self._sums)

    def guide_means(self) -> GuideMeans | None:
        """None where every window had weight 0."""
        if not self._guide_weight:
            return None
        current = self._guide_loss / self._guide_weight
        return GuideMeans(current, self._sum_of_means / self.windows)

    def _count_text(self, window: Window) -> None:
        if self.text is None:
            return
        if window.texts is None:
            self.text = None
            return
        if window.document != self._document:
            self.text.start_document()
            self._document = window.document
        self.text.feed("".join(window.texts))
