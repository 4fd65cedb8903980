"""Rows of logits restricted to their nucleus, as top-p sampling restricts them."""

from __future__ import annotations

from typing import Any

import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.nucleus import nucleus

# Columns of the row state that describe the whole row whatever the top-p.
WHOLE_ROW = (rs.SECOND, rs.ARGMAX, rs.MEAN, rs.M2, rs.COUNT, rs.RANK)
WHOLE_ROW_BITS = rs.TOP_BIT | rs.MOMENTS_BIT | rs.RANK_BIT


def truncated_state(
    x: torch.Tensor,
    targets: torch.Tensor,
    top_p: float,
    threshold: torch.Tensor | None,
    mask: int,
    ops: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The row state of the nucleus, with the columns in `WHOLE_ROW` those of the whole row.

    Args:
        x: float32 [c, V], transformed logits of the whole vocabulary. What lies outside the nucleus
            becomes -inf.
        targets: int64 [c, k].
        top_p: in (0, 1).
        threshold: float32 [c], with the rank only.
        mask: bits of `row_state`.
        ops: the operators of the device.

    Returns:
        State float32 [c, columns], the targets' x float32 [c, k] (-inf outside the nucleus), and
        the nucleus's probability float32 [c].
    """
    # The rank is that of the first target.
    first = targets[:, :1].contiguous()
    whole, unused = rs.new_state(len(x), x.device), rs.new_target_logits(len(x), 1, x.device)
    ops.reduce_logits(x, first, 0, threshold, 1.0, 0.0, 1.0, mask & WHOLE_ROW_BITS, whole, unused)
    floor, surplus, mass = nucleus(x, top_p, log_partition=rs.log_sum_exp(whole))
    x.masked_fill_(x < floor[:, None], float("-inf"))
    state = rs.new_state(len(x), x.device)
    found = rs.new_target_logits(len(x), targets.shape[1], x.device)
    ops.reduce_logits(x, targets, 0, None, 1.0, 0.0, 1.0, mask & ~WHOLE_ROW_BITS, state, found)
    _leave_out(state, floor, surplus)
    for column in WHOLE_ROW:
        state[:, column] = whole[:, column]
    return state, found, mass


def _leave_out(state: torch.Tensor, floor: torch.Tensor, surplus: torch.Tensor) -> None:
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
