"""What a decision asks of a model, said without saying which engine does it.

The code that decides is written as generators: they yield a `Batch` and are sent its results. So
it runs unchanged on an `LLM`, on an `AsyncLLM` beside thousands of other requests, and on an exact
sampler; and whoever drives many generators keeps an engine full without threads or locks.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from vllm.score.errors import ScoreModeError, ScoreModeUnavailable

T = TypeVar("T")


class DeadlineExceeded(ScoreModeError):
    """The work was not done in time; what was running is aborted."""


@dataclass(frozen=True)
class Sample:
    """Continuations of a context, drawn from the model; the result is a list of `Continuation`.

    Attributes:
        context: [n] token ids, n >= 1.
        count: number of independent draws.
        max_tokens: tokens of each at most.
        temperature, top_p: the policy; temperature 0 is greedy.
        stop: texts that end a continuation; they stay in its tokens and its text.
        ignore_eos: go on behind the end-of-sequence token.
    """

    context: Sequence[int]
    count: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Continuation:
    """One draw.

    Attributes:
        token_ids: [m] without the end-of-sequence token.
        text: of these tokens.
        finished: it ended by itself (end of sequence, or a stop text), not by `max_tokens`.
    """

    token_ids: list[int]
    text: str
    finished: bool


@dataclass(frozen=True)
class Score:
    """Log-probabilities of token sequences after a context.

    The result is a list with a float32 array [m_i], in nats, for each target: log p(target token
    | context, the target's tokens before it), under the model at temperature 1.

    Attributes:
        context: [n] token ids, n >= 1.
        targets: each [m_i] token ids, m_i >= 1.
    """

    context: Sequence[int]
    targets: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Next:
    """The most likely next tokens; the result is (int64 [top], float32 [top] in nats), best first.

    Attributes:
        context: [n] token ids, n >= 1.
        top: from 1 to 20.
    """

    context: Sequence[int]
    top: int


Work = Sample | Score | Next


@dataclass(frozen=True)
class Batch:
    """Work that can be done at once; the generator is sent a list of results in this order.

    If a piece fails, or the deadline passes, the rest is aborted and the error is thrown into the
    generator (unless it `ends_everything`).

    Attributes:
        work: independent pieces, at least one.
        deadline: on the clock of `time.monotonic`; None: whenever.
    """

    work: Sequence[Work]
    deadline: float | None = None


Steps = Generator[Batch, list[Any], T]


class Reasoner(Protocol):
    """A model that does one batch after the other, and its tokenizer."""

    tokenizer: Any

    def run(self, batch: Batch) -> list[Any]:
        """The results of a batch.

        Raises:
            DeadlineExceeded: it was not done in time.
        """
        ...


def ends_everything(error: Exception) -> bool:
    """Whether an error is the engine's and no batch's: score mode is off there, or it is dead.

    It leaves the driver. Thrown into a generator it would count as a decision that failed, and a
    run would go on to say so of every question.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, (ScoreModeUnavailable, EngineDeadError))


def drive(steps: Steps[T], reasoner: Reasoner) -> T:
    """Run one generator to its end."""
    try:
        batch = next(steps)
        while True:
            try:
                results = reasoner.run(batch)
            except Exception as error:
                if ends_everything(error):
                    raise
                batch = steps.throw(error)
            else:
                batch = steps.send(results)
    except StopIteration as stop:
        return stop.value


def total(logprobs: np.ndarray) -> float:
    """Sum of float32 log-probabilities, in float64."""
    return float(np.sum(logprobs, dtype=np.float64))
