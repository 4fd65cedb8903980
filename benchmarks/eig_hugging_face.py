"""A decision by expected information gain the Hugging Face way: `generate` and whole forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Forecasts:
    """What a decision rests on, here with K continuations and A answers.

    Attributes:
        log_posteriors: float64 [1 + K, A], now and after each continuation, in nats.
        entropies: float64 [1 + K], theirs.
    """

    log_posteriors: np.ndarray
    entropies: np.ndarray


class HuggingFaceDecisions:
    """Decisions without an engine.

    Args:
        hf: the model; its generation config names no end-of-sequence token.
        cue: token ids between the reasoning and an answer.
        answers: [A, m] token ids.
        sampling: `generate`'s arguments.
        together: draw all continuations in one batch and score all answers of a state in one,
            with the logits of the answers alone, not one after another.
    """

    def __init__(
        self,
        hf: Any,
        cue: Sequence[int],
        answers: Sequence[Sequence[int]],
        sampling: dict[str, Any],
        together: bool,
    ) -> None:
        self.hf, self.cue, self.answers = hf, list(cue), [list(a) for a in answers]
        self.sampling, self.together = sampling, together

    def decide(self, context: Sequence[int], count: int) -> Forecasts:
        """Draw `count` continuations, and score every answer before and after them."""
        drawn = self.draw(context, count)
        return self.forecasts([list(context), *([*context, *d] for d in drawn)])

    def draw(self, context: Sequence[int], count: int) -> list[list[int]]:
        """Continuations; within one call `generate` keeps its cache, as it always does."""
        import torch

        ids = torch.tensor([list(context)], device=self.hf.device)
        batch = count if self.together else 1
        drawn: list[list[int]] = []
        with torch.inference_mode():
            while len(drawn) < count:
                found = self.hf.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    num_return_sequences=batch,
                    **self.sampling,
                )
                drawn += found[:, ids.shape[1] :].tolist()
        return drawn

    def forecasts(self, states: Sequence[Sequence[int]]) -> Forecasts:
        """Posteriors over the answers at these states."""
        scores = np.array([self._answer_logprobs([*s, *self.cue]) for s in states])
        log_posteriors = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        return Forecasts(log_posteriors, -(np.exp(log_posteriors) * log_posteriors).sum(-1))

    def _answer_logprobs(self, context: list[int]) -> np.ndarray:
        """log p(answer | context), float64 [A]: a log-softmax in float32 of the answers' rows."""
        import torch

        wholes = torch.tensor([context + a for a in self.answers], device=self.hf.device)
        m = len(self.answers[0])
        more = {"logits_to_keep": m + 1} if self.together else {}
        sums = []
        with torch.inference_mode():
            for ids in wholes.split(len(self.answers) if self.together else 1):
                logits = self.hf(ids, use_cache=False, **more).logits[:, -m - 1 : -1]
                logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, -m:, None])[..., 0]
                sums += logprobs.double().sum(-1).tolist()
        return np.array(sums)
