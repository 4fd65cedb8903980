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

from collections.abc import Mapping
from types import MappingProxyType

import torch

from vllm.score.ops.row_layout import RowLayout

MAX, SUM_EXP, SUM_EXP_X, SUM_EXP2, SECOND, ARGMAX, MEAN, M2, COUNT, RANK, SUM_EXP_DEV2 = range(11)
WIDTH = 11

# Bits of the `statistics` argument of the operators; MAX and SUM_EXP are always computed. The
# varentropy's is valid only beside the entropy's, whose column holds its mean.
ENTROPY_BIT, COLLISION_BIT, TOP_BIT, MOMENTS_BIT, RANK_BIT, VARENTROPY_BIT = 1, 2, 4, 8, 16, 32

_BITS_OF = {
    "entropy": ENTROPY_BIT,
    "varentropy": ENTROPY_BIT | VARENTROPY_BIT,
    "rank": RANK_BIT,
    "argmax": TOP_BIT,
    "argmax_logprob": 0,
    "margin": TOP_BIT,
    "collision_probability": COLLISION_BIT,
    "logsumexp": 0,
    # Not of the state.
    "head_mass": 0,
    "model_logprob": 0,
    "logit_mean": MOMENTS_BIT,
    "logit_variance": MOMENTS_BIT,
}


def statistics_mask(names: tuple[str, ...]) -> int:
    """The bits that the named statistics need."""
    mask = 0
    for name in names:
        mask |= _BITS_OF[name]
    return mask


def new_state(rows: int, device: torch.device) -> torch.Tensor:
    """The state of `rows` rows of which no logit has been seen, float32 [rows, 11]."""
    state = torch.zeros(rows, WIDTH, dtype=torch.float32, device=device)
    state[:, MAX] = state[:, SECOND] = float("-inf")
    state[:, ARGMAX] = -1
    return state


def new_target_logits(rows: int, num_targets: int, device: torch.device) -> torch.Tensor:
    """Float32 [rows, num_targets] of -inf: no target has been seen."""
    return torch.full((rows, num_targets), float("-inf"), dtype=torch.float32, device=device)


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


def score_columns(
    state: torch.Tensor,
    target_logits: torch.Tensor,
    layout: RowLayout,
    out: torch.Tensor,
    given: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Write the targets' log-probabilities and the statistics, in nats.

    Args:
        state: float32 [R, 11], of the whole vocabulary.
        target_logits: float32 [R, k].
        layout: names the columns.
        out: float32 [R, at least k + number of statistics]; its first columns are written.
        given: statistics that the state does not hold, by name, float32 [R].
    """
    k = layout.num_targets
    if k:
        torch.sub(target_logits[:, :k], log_sum_exp(state)[:, None], out=out[:, :k])
        # Targets may be summed in another order than the row, and come out above it by a rounding.
        out[:, :k].clamp_max_(0.0)
    for column, name in enumerate(layout.statistics, start=k):
        out[:, column] = given[name] if name in given else _statistic(name, state)


def _statistic(name: str, state: torch.Tensor) -> torch.Tensor:
    total = state[:, SUM_EXP]
    if name == "entropy":
        return torch.log(total) - state[:, SUM_EXP_X] / total
    if name == "varentropy":
        return state[:, SUM_EXP_DEV2] / total
    if name == "rank":
        return state[:, RANK] + 1
    if name == "argmax":
        return state[:, ARGMAX]
    if name == "argmax_logprob":
        return -torch.log(total)
    if name == "margin":
        return state[:, MAX] - state[:, SECOND]
    if name == "collision_probability":
        return state[:, SUM_EXP2] / (total * total)
    if name == "logsumexp":
        return log_sum_exp(state)
    if name == "logit_mean":
        return state[:, MEAN]
    if name == "logit_variance":
        return state[:, M2] / state[:, COUNT]
    raise ValueError(f"no implementation computes the statistic {name!r}.")
