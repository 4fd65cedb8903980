"""What a decision asks of a model: batches of work for a `Reasoner`.

Code that decides is coroutines that await `reasoner.run(batch)`. So it runs unchanged on an `LLM`,
on an `AsyncLLM` beside thousands of other requests (`vllm.score.eig.engines`), and on an exact
sampler; and many of them, side by side, keep an engine full.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
from vllm.v1.engine.exceptions import EngineDeadError

T = TypeVar("T")

MAX_TOP = 20


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
    """Work that can be done at once; the results are a list in this order.

    Attributes:
        work: independent pieces, at least one.
        deadline: on the clock of `time.monotonic`; None: whenever.
    """

    work: Sequence[Work]
    deadline: float | None = None


class Reasoner(Protocol):
    """A model that does batches of work, and its tokenizer."""

    tokenizer: Any

    async def run(self, batch: Batch) -> list[Any]:
        """The results of a batch. Where a piece fails, the rest is aborted.

        Raises:
            DeadlineExceeded: it was not done in time; what was running is aborted.
            ScoreModeError: the work is malformed, or it failed.
        """
        ...


# Something to find out about a model, e.g. the reasoning about one question.
Problem = Callable[[Reasoner], Coroutine[Any, Any, T]]


def ends_everything(error: BaseException) -> bool:
    """Whether an error is the engine's and no batch's: score mode is off there, or it is dead.

    Taken for a decision that failed, it would be said of every question of a run.
    """
    return isinstance(error, (ScoreModeUnavailable, EngineDeadError))
