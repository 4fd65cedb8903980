"""Top-p: a row's nucleus, the fewest most likely tokens whose probabilities reach top-p, and the
row's sums restricted to it, as top-p sampling restricts it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from vllm.score.ops import row_state as rs
from vllm.score.ops.kernels import reduce_logits
from vllm.score.ops.row_state import Reduction

# Tokens looked at before a row is sorted as a whole: most nuclei of language models are smaller.
FIRST_LOOK = 1024
# Bytes of temporaries while whole rows are sorted.
SORT_BYTES = 64 << 20
_BYTES_PER_ENTRY = 40  # values, their places and the sums of one sorted entry
# Probabilities are added up as whole numbers of this unit: exactly, so in any order alike, which
# sums of floats are not on a GPU. Three bits are left for a sum that exceeds 1 by roundings.
_ONE = 1 << 60
# In units of the dtype's precision: what a sum of p may be off.
_SLACK = 4
# Columns of the row state that describe the whole row whatever the top-p.
WHOLE_ROW = (rs.SECOND, rs.ARGMAX, rs.MEAN, rs.M2, rs.COUNT, rs.RANK)
WHOLE_ROW_BITS = rs.TOP_BIT | rs.MOMENTS_BIT | rs.RANK_BIT


@torch.no_grad()
def nucleus(
    x: Tensor, top_p: float, *, log_partition: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens top-p sampling keeps: the n largest, the fewest whose p add up to `top_p`.

    Which of several equal tokens at the boundary are kept is left open; their number is not. A sum
    that misses `top_p` by no more than roundings of p reaches it.

    Args:
        x: logits divided by the temperature, [N, V], float32 or float64, V at least 1; not
            modified. ``p = softmax(x)``.
        top_p: in (0, 1).
        log_partition: [N], ``log sum exp x`` where it is known, which saves a pass.

    Returns:
        floor: [N], the smallest kept x.
        surplus: int64 [N], how many tokens with x equal to the floor are left out.
        mass: [N], p of the n kept tokens together.
        Floor and mass are NaN for a row with NaN, +inf, or nothing but -inf.
    """
    rows, columns = x.shape
    first = torch.topk(x, min(columns, FIRST_LOOK), dim=1).values
    # Shifted by the maximum, equal logits of a small vocabulary get exact probabilities.
    shift = first[:, :1] if log_partition is None else log_partition.reshape(rows, 1)
    total = (x - shift).exp_().sum(1, keepdim=True) if log_partition is None else None
    floor, kept, mass, reached = _cut(first, shift, total, top_p)
    if first.shape[1] < columns:
        wide = (~reached).nonzero().squeeze(1)
        block = max(1, SORT_BYTES // (_BYTES_PER_ENTRY * columns))
        for part in wide.split(block):
            ordered = x[part].sort(dim=1, descending=True).values
            some = None if total is None else total[part]
            floor[part], kept[part], mass[part], _ = _cut(ordered, shift[part], some, top_p)
    bad = ~torch.isfinite(shift if total is None else shift + total).squeeze(1)
    floor.masked_fill_(bad, float("nan"))
    mass.masked_fill_(bad, float("nan"))
    surplus = (x >= floor[:, None]).sum(1) - kept
    return floor, surplus.clamp_min_(0), mass


def _cut(
    ordered: Tensor, shift: Tensor, total: Tensor | None, top_p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Smallest kept x, number and mass of the kept tokens of rows in descending order, and whether
    they reach `top_p`."""
    p = (ordered - shift).exp_()
    if total is not None:
        p /= total
    sums = p.mul_(_ONE).to(torch.int64).cumsum(1)
    # Every term is rounded by less than one unit.
    least = math.ceil(top_p * (1 - _SLACK * torch.finfo(p.dtype).eps) * _ONE) - p.shape[1]
    below = sums < least
    # Where no sum reaches top-p, the last entry: the caller looks at more of the row, if there is.
    last = below.sum(1, keepdim=True).clamp_max_(ordered.shape[1] - 1)
    floor = ordered.gather(1, last).squeeze(1)
    mass = sums.gather(1, last).squeeze(1).double().div_(_ONE).clamp_max_(1.0)
    return floor, last.squeeze(1) + 1, mass.to(ordered.dtype), ~below[:, -1]


def reduce_nucleus(x: Tensor, top_p: float, out: Reduction) -> Tensor:
    """Add rows to their sums, restricted to their nuclei but for the columns in `WHOLE_ROW`.

    Args:
        x: float32 [c, V], transformed logits of the whole vocabulary. What lies outside the nucleus
            becomes -inf.
        top_p: in (0, 1).
        out: new sums, without a transform. Targets outside the nucleus stay -inf.

    Returns:
        The nucleus's probability, float32 [c].
    """
    # The rank is that of the first target.
    first = out.targets[:, :1].contiguous()
    bits = out.statistics & WHOLE_ROW_BITS
    whole = Reduction(first, statistics=bits, threshold=out.threshold)
    reduce_logits(x, whole)
    floor, surplus, mass = nucleus(x, top_p, log_partition=rs.log_sum_exp(whole.state))
    x.masked_fill_(x < floor[:, None], float("-inf"))
    reduce_logits(x, replace(out, statistics=out.statistics & ~WHOLE_ROW_BITS, threshold=None))
    _leave_out(out.state, floor, surplus)
    for column in WHOLE_ROW:
        out.state[:, column] = whole.state[:, column]
    return mass


def _leave_out(state: Tensor, floor: Tensor, surplus: Tensor) -> None:
    """Take `surplus` ids at the smallest kept x out of the sums: the count of the nucleus is what
    is defined where ids are tied, not which of them are kept.
    """
    b = floor - state[:, rs.MAX]
    e = b.exp()
    weight = surplus * e
    mean = state[:, rs.SUM_EXP_X] / state[:, rs.SUM_EXP]
    state[:, rs.SUM_EXP] -= weight
    state[:, rs.SUM_EXP_X] -= weight * b
    state[:, rs.SUM_EXP2] -= weight * e
    rest = state[:, rs.SUM_EXP_X] / state[:, rs.SUM_EXP]
    state[:, rs.SUM_EXP_DEV2] -= weight * (b - mean) * (b - rest)
    state[:, rs.SUM_EXP_DEV2].clamp_min_(0.0)
