"""Hidden states to scores: the one place where the head's product, its reduction and the exchange
between ranks come together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.head import Head
from vllm.score.ops.operators import operators
from vllm.score.ops.reference import product, transform
from vllm.score.ops.row_layout import FULL_VOCABULARY, RowLayout
from vllm.score.ops.truncated import truncated_state

# Rows whose states are held at once. Their hidden states are gathered only where they are not
# consecutive, so this bounds that copy as well.
MAX_BLOCK_ROWS = 16_384
GATHERED_BYTES = 32 << 20
# Logits that are held at once where the head's own product or a whole row is needed.
LOGITS_BYTES = 48 << 20


def block_rows(needs_logits: bool, layout: RowLayout, vocab_size: int, hidden_bytes: int) -> int:
    """Rows scored at once, so that scoring takes less than 128 MiB beside the model.

    The same on every rank, whatever its share of the vocabulary: they exchange block by block.

    Args:
        needs_logits: `Head.needs_logits`.
        vocab_size: of the model.
        hidden_bytes: of one hidden state that has to be copied; 0 where it need not be.
    """
    rows = MAX_BLOCK_ROWS
    if hidden_bytes:
        rows = min(rows, max(1, GATHERED_BYTES // hidden_bytes))
    if layout.needs_logits:
        # Float32 logits, and the results of the block before or, with top-p, a copy.
        beside = max(layout.width(vocab_size), vocab_size if layout.top_p < 1 else 0)
        rows = min(rows, max(1, LOGITS_BYTES // (4 * (vocab_size + beside))))
    elif needs_logits:
        rows = min(rows, max(1, LOGITS_BYTES // (4 * vocab_size)))
    return rows


def score_rows(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, layout: RowLayout, vocab_size: int
) -> torch.Tensor:
    """Score rows of hidden states.

    Every rank of a tensor-parallel group calls this with the same rows; the exchange is one
    all-gather of 11 + k floats a row (two when the rank of the target is asked for).

    Args:
        head: this rank's part of it.
        hidden: [c, H], as the head takes them.
        targets: int64 [c, k]; for the whole vocabulary k is 0 or, where the rank is asked for,
            1: the token whose rank it is.
        layout: what to compute.
        vocab_size: V.

    Returns:
        float32 [c, layout.width(V)].
    """
    mask = rs.statistics_mask(layout.statistics)
    targets = targets.contiguous()
    common = (head.scale, head.soft_cap, layout.temperature)
    ops = operators(hidden.device.type)
    logits = _logits(head, hidden) if layout.needs_logits or head.needs_logits else None
    if layout.top_p < 1 and head.gather is not None:
        head, logits = _whole_vocabulary(head, logits, vocab_size)
    threshold = None
    if mask & rs.RANK_BIT:
        threshold = _threshold(head, hidden, logits, targets, common, ops)
    given = {}
    if "model_logprob" in layout.statistics:
        given["model_logprob"] = _model_logprob(head, hidden, logits, targets[:, :1], ops)
    x = None if logits is None or not layout.needs_logits else transform(logits, *common)
    if layout.top_p < 1:
        state, found, mass = truncated_state(x, targets, layout.top_p, threshold, mask, ops)
    else:
        state, found = _reduced(head, hidden, logits, targets, threshold, common, mask, ops)
        mass = torch.ones_like(state[:, 0])
    given["head_mass"] = mass
    out = torch.empty(
        len(hidden), layout.width(vocab_size), dtype=torch.float32, device=hidden.device
    )
    rs.score_columns(state, found, layout, out, given)
    if layout.top:
        _top_columns(head, x, rs.log_sum_exp(state), layout, out[:, layout.top_start :])
    return out


def _reduced(
    head: Head,
    hidden: torch.Tensor,
    logits: torch.Tensor | None,
    targets: torch.Tensor,
    threshold: torch.Tensor | None,
    common: tuple[float, float, float],
    mask: int,
    ops: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state and the targets' logits of whole rows, of all ranks."""
    state = rs.new_state(len(hidden), hidden.device)
    found = rs.new_target_logits(len(hidden), targets.shape[1], hidden.device)
    # A rank may hold padding only.
    if head.num_ids:
        source = (logits,) if logits is not None else (hidden, head.weight, head.bias)
        run = ops.reduce_logits if logits is not None else ops.score_head
        run(*source, targets, head.first_id, threshold, *common, mask, state, found)
    if head.gather is not None:
        both = head.gather(torch.cat([state, found], dim=1))
        state = rs.merge(both[..., : rs.WIDTH])
        found = both[..., rs.WIDTH :].amax(dim=0)
    return state, found


def _model_logprob(
    head: Head,
    hidden: torch.Tensor,
    logits: torch.Tensor | None,
    target: torch.Tensor,
    ops: Any,
) -> torch.Tensor:
    """Float32 [c]: log-probability of the first target, [c, 1], at temperature 1 and top-p 1.

    A pass of its own, so that the others need not carry a second sum.
    """
    common = (head.scale, head.soft_cap, 1.0)
    state, found = _reduced(head, hidden, logits, target.contiguous(), None, common, 0, ops)
    return (found[:, 0] - rs.log_sum_exp(state)).clamp_max(0.0)


def _whole_vocabulary(
    head: Head, logits: torch.Tensor, vocab_size: int
) -> tuple[Head, torch.Tensor]:
    """The logits [c, V] of all ranks, and the head of a rank that has them all."""
    whole = torch.empty(len(logits), vocab_size, dtype=torch.float32, device=logits.device)
    _gather_vocabulary(head, logits.float(), whole)
    alone = replace(head, weight=None, first_id=0, num_ids=vocab_size, gather=None, delta=None)
    return alone, whole


def _logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """This range's raw logits [c, n], float32 where the weights are plain."""
    if head.weight is None:
        logits = head.logits_of(hidden)[:, : head.num_ids]
    else:
        logits = product(hidden, head.weight, head.bias)
    return logits if head.delta is None else head.delta(hidden).add_(logits)


def _threshold(
    head: Head,
    hidden: torch.Tensor,
    logits: torch.Tensor | None,
    targets: torch.Tensor,
    common: tuple[float, float, float],
    ops: Any,
) -> torch.Tensor:
    """Float32 [c]: the logit of the first target, whichever rank has it."""
    first = targets[:, :1].contiguous()
    out = rs.new_target_logits(len(first), 1, first.device)
    if head.num_ids and logits is not None:
        inside = first - head.first_id
        held = (inside >= 0) & (inside < head.num_ids)
        x = transform(logits.gather(1, inside.clamp(0, head.num_ids - 1)), *common)
        out = torch.where(held, x, out)
    elif head.num_ids:
        ops.target_logits(hidden, head.weight, head.bias, first, head.first_id, *common, out)
    if head.gather is not None:
        out = head.gather(out).amax(dim=0)
    return out[:, 0].contiguous()


def _top_columns(
    head: Head, x: torch.Tensor, lse: torch.Tensor, layout: RowLayout, out: torch.Tensor
) -> None:
    """The whole vocabulary's log-probabilities, or the most likely ids and theirs."""
    if layout.top == FULL_VOCABULARY:
        x.sub_(lse[:, None])
        if head.gather is None:
            out.copy_(x)
            return
        _gather_vocabulary(head, x, out)
        return
    count = min(layout.top, x.shape[1])
    values, ids = torch.topk(x, count, dim=-1)
    ids = ids + head.first_id
    if head.gather is not None:
        pad = layout.top - count
        values = torch.nn.functional.pad(values, (0, pad), value=float("-inf"))
        # Ids are exact in float32, and one exchange is cheaper than two.
        ids = torch.nn.functional.pad(ids, (0, pad)).float()
        both = head.gather(torch.stack([values, ids], dim=1))  # [P, c, 2, top]
        both = both.permute(1, 2, 0, 3).flatten(2)
        values, chosen = torch.topk(both[:, 0], layout.top, dim=-1)
        ids = both[:, 1].gather(1, chosen)
    out[:, : layout.top] = ids.float()
    out[:, layout.top :] = values - lse[:, None]


def _gather_vocabulary(head: Head, x: torch.Tensor, out: torch.Tensor) -> None:
    assert head.gather is not None
    # As floats: vLLM's exchange between CPU processes knows no integers.
    own = torch.full((1,), x.shape[1], dtype=torch.float32, device=x.device)
    counts = [int(count) for count in head.gather(own)[:, 0].tolist()]
    width = max(counts)
    parts = head.gather(torch.nn.functional.pad(x, (0, width - x.shape[1])))
    torch.cat([part[:, :n] for part, n in zip(parts, counts, strict=True)], dim=1, out=out)
