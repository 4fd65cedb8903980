"""Problems for reasoners, of one batch or of several."""

from __future__ import annotations

from vllm.score.eig.records import Batch, Next
from vllm.score.errors import ScoreModeError


def ask(*work, deadline=None):
    """A problem of one batch."""

    async def problem(reasoner):
        return await reasoner.run(Batch(work, deadline))

    return problem


def failing(*work, deadline=None):
    """A problem that returns the error of its batch."""

    async def problem(reasoner):
        try:
            return await reasoner.run(Batch(work, deadline))
        except ScoreModeError as error:
            return error

    return problem


def by_next(context, steps):
    """As many batches as tokens."""

    async def problem(reasoner):
        chain = list(context)
        for _ in range(steps):
            ((ids, _),) = await reasoner.run(Batch([Next(chain, 1)]))
            chain.append(int(ids[0]))
        return chain[len(context) :]

    return problem
