"""The running state of a row of logits: what every implementation of the reduction computes.

One float32 row of eleven columns a scored row, whatever the vocabulary size. States of disjoint
parts of the vocabulary merge exactly, so tiles, shards and ranks need to exchange nothing else.
With x the row's logits (scaled, capped, divided by the temperature), over the ids seen so far:

============  ============================================================================
MAX           ``m = max x``
SUM_EXP       ``sum exp(x - m)``
SUM_EXP_X     ``sum exp(x - m) (x - m)``, the entropy's part
SUM_EXP2      ``sum exp(2 (x - m))``, the collision probability's part
SECOND        the second largest x, equal to MAX on a tie
ARGMAX        id of the largest, the lowest among equals
MEAN, M2      mean, and sum of squares about it
COUNT         ids seen
RANK          ids other than the first target whose x exceeds the threshold
SUM_EXP_DEV2  ``sum exp(x - m) (x - c)**2`` about the weighted mean
              ``c = m + SUM_EXP_X / SUM_EXP``, the varentropy's part
============  ============================================================================

The varentropy is kept as a sum of squares about the mean, as MEAN and M2 are (Chan, Golub and
LeVeque, 1979, with weights). ``sum exp(x - m) (x - m)**2`` would merge as easily, but where
little of the weight is near the maximum its share and the squared mean nearly cancel: float32 then
leaves an error of 1e-4, and of 2e-3 of the result, at a vocabulary of 152k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

MAX, SUM_EXP, SUM_EXP_X, SUM_EXP2, SECOND, ARGMAX, MEAN, M2, COUNT, RANK, SUM_EXP_DEV2 = range(11)
WIDTH = 11

# Bits of the `statistics` argument of the operators; MAX and SUM_EXP are always computed. The
# varentropy's is valid only beside the entropy's, whose column holds its mean.
ENTROPY_BIT, COLLISION_BIT, TOP_BIT, MOMENTS_BIT, RANK_BIT, VARENTROPY_BIT = 1, 2, 4, 8, 16, 32
COLUMNS_OF = {
    ENTROPY_BIT: [SUM_EXP_X],
    VARENTROPY_BIT: [SUM_EXP_DEV2],
    COLLISION_BIT: [SUM_EXP2],
    TOP_BIT: [SECOND, ARGMAX],
    MOMENTS_BIT: [MEAN, M2, COUNT],
    RANK_BIT: [RANK],
}


@dataclass(frozen=True)
class Transform:
    """Raw logits z to ``x = scale * cap(z) / temperature``, float32.

    ``cap(z) = soft_cap * tanh(z / soft_cap)``; a `soft_cap` of 0 means none.
    """

    scale: float = 1.0
    soft_cap: float = 0.0
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """``scale / temperature``, rounded once: equal logits stay equal."""
        return self.scale / self.temperature

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        x = z.float()
        if self.soft_cap > 0:
            x = torch.tanh(x / self.soft_cap) * self.soft_cap
        return x if self.factor == 1.0 else x * self.factor


IDENTITY = Transform()


@dataclass
class Reduction:
    """What is computed of R rows of logits, and the tensors that the operators add it to, in place.

    Attributes:
        targets: int64 [R, k], ids of the whole vocabulary.
        transform: of raw logits to x.
        statistics: bits of the columns to compute.
        threshold: float32 [R], x of the first target; with RANK_BIT only.
        first_id: id of the first column of the logits that are added next.
        state: float32 [R, 11], see above; by default that of rows of which no logit has been seen.
        target_logits: float32 [R, k], x of the targets seen so far, -inf for the others; by
            default no target has been seen.
    """

    targets: torch.Tensor
    transform: Transform = IDENTITY
    statistics: int = 0
    threshold: torch.Tensor | None = None
    first_id: int = 0
    state: torch.Tensor = None
    target_logits: torch.Tensor = None

    def __post_init__(self) -> None:
        options = {"dtype": torch.float32, "device": self.targets.device}
        if self.state is None:
            self.state = torch.zeros(len(self.targets), WIDTH, **options)
            self.state[:, MAX] = self.state[:, SECOND] = float("-inf")
            self.state[:, ARGMAX] = -1
        if self.target_logits is None:
            self.target_logits = torch.full(self.targets.shape, float("-inf"), **options)

    def rows(self, part: slice) -> Reduction:
        """That of some of the rows, on the same memory."""
        return replace(
            self,
            targets=self.targets[part],
            state=self.state[part],
            target_logits=self.target_logits[part],
            threshold=None if self.threshold is None else self.threshold[part],
        )

    def at(self, first_id: int) -> Reduction:
        """The same before the logits of another part of the vocabulary."""
        return replace(self, first_id=first_id)

    def put_targets(self, count: int, x_at: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write the x of the targets among the next `count` ids, at least one.

        Args:
            x_at: gives it for columns int64 [R, k] of 0 .. count - 1.
        """
        column = self.targets - self.first_id
        held = (column >= 0) & (column < count)
        x = x_at(column.clamp(0, count - 1))
        self.target_logits.copy_(torch.where(held, x, self.target_logits))

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As the operators take them, behind their operands."""
        x, rows = self.transform, (self.targets, self.first_id, self.threshold)
        return *rows, x.factor, x.soft_cap, self.statistics, self.state, self.target_logits


def merge(states: torch.Tensor) -> torch.Tensor:
    """Merge the states of consecutive parts of the vocabulary.

    Args:
        states: float32 [P, R, 11], parts in ascending order of ids.

    Returns:
        float32 [R, 11]. Columns that the parts do not have mean nothing here either.
    """
    if states.shape[0] == 1:
        return states[0]
    top = states[..., MAX]
    m, owner = top.max(dim=0)
    # A part without a finite logit weighs nothing; NaN is not -inf and stays.
    seen = top != float("-inf")
    shift = torch.where(seen, top - m, 0.0)
    weight = torch.where(seen, torch.exp(shift), 0.0)
    out = torch.empty_like(states[0])
    out[:, MAX] = m
    sums = states[..., SUM_EXP] * weight
    out[:, SUM_EXP] = sums.sum(0)
    moved = states[..., SUM_EXP_X] + shift * states[..., SUM_EXP]
    out[:, SUM_EXP_X] = torch.where(weight == 0, 0.0, weight * moved).sum(0)
    mean = shift + states[..., SUM_EXP_X] / states[..., SUM_EXP]
    apart = torch.where(sums > 0, mean - out[:, SUM_EXP_X] / out[:, SUM_EXP], 0.0)
    out[:, SUM_EXP_DEV2] = (states[..., SUM_EXP_DEV2] * weight + sums * apart * apart).sum(0)
    out[:, SUM_EXP2] = (states[..., SUM_EXP2] * weight * weight).sum(0)
    # The second of all is the winner's second or the largest of another part.
    others = top.scatter(0, owner[None], states[..., SECOND].gather(0, owner[None]))
    out[:, SECOND] = others.max(dim=0).values
    # torch.max may return any of several equal maxima; the first part holds the lowest id.
    ids = torch.where(top == m, states[..., ARGMAX], float("inf"))
    out[:, ARGMAX] = torch.where(torch.isinf(m), states[0, :, ARGMAX], ids.min(dim=0).values)
    count = states[..., COUNT]
    total = count.sum(0)
    mean = (states[..., MEAN] * count).sum(0) / total.clamp_min(1)
    apart = torch.where(count > 0, states[..., MEAN] - mean, 0.0)
    out[:, MEAN] = mean
    out[:, M2] = (states[..., M2] + count * apart * apart).sum(0)
    out[:, COUNT] = total
    out[:, RANK] = states[..., RANK].sum(0)
    return out


def log_sum_exp(state: torch.Tensor) -> torch.Tensor:
    """``log sum exp x`` of each row, float32 [R]; NaN where a row had NaN or +inf."""
    return state[:, MAX] + torch.log(state[:, SUM_EXP])
