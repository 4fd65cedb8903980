"""Hidden states to scores: the one place where the head's product, its reduction and the exchange
between ranks come together.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.head import Head, reduce_logits, score_head, target_logits
from vllm.score.ops.kernels import choose_kernel
from vllm.score.ops.row_layout import FULL_VOCABULARY, RowLayout
from vllm.score.ops.row_state import Reduction, Transform
from vllm.score.ops.statistics import score_columns, statistics_mask
from vllm.score.ops.top_p import reduce_nucleus

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
    all-gather of 11 + k floats per row (two when the rank of the target is asked for).

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
    choose_kernel(hidden.device.type)
    mask = statistics_mask(layout.statistics)
    targets = targets.contiguous()
    transform = Transform(head.scale, head.soft_cap, layout.temperature)
    logits = head.logits(hidden) if layout.needs_logits or head.needs_logits else None
    if layout.top_p < 1 and head.gather is not None:
        head, logits = _whole_vocabulary(head, logits, vocab_size)
    threshold = None
    if mask & rs.RANK_BIT:
        threshold = _threshold(head, hidden, logits, Reduction(_first(targets), transform))
    given = {}
    if "model_logprob" in layout.statistics:
        given["model_logprob"] = _model_logprob(head, hidden, logits, targets)
    x = None if logits is None or not layout.needs_logits else transform(logits)
    if layout.top_p < 1:
        done = Reduction(targets, statistics=mask, threshold=threshold)
        given["head_mass"] = reduce_nucleus(x, layout.top_p, done)
    else:
        done = _reduce(head, hidden, logits, Reduction(targets, transform, mask, threshold))
        given["head_mass"] = torch.ones_like(done.state[:, 0])
    out = torch.empty(
        len(hidden), layout.width(vocab_size), dtype=torch.float32, device=hidden.device
    )
    score_columns(done.state, done.target_logits, layout, out, given)
    if layout.top:
        _top_columns(head, x, rs.log_sum_exp(done.state), layout, out[:, layout.top_start :])
    return out


def _first(targets: torch.Tensor) -> torch.Tensor:
    return targets[:, :1].contiguous()


def _reduce(
    head: Head, hidden: torch.Tensor, logits: torch.Tensor | None, out: Reduction
) -> Reduction:
    """The sums and the targets' logits of whole rows, of all ranks."""
    here = out.at(head.first_id)
    # A rank may hold padding only.
    if head.num_ids and logits is not None:
        reduce_logits(logits, here)
    elif head.num_ids:
        score_head(hidden, head.weight, head.bias, here)
    if head.gather is None:
        return out
    both = head.gather(torch.cat([out.state, out.target_logits], dim=1))
    state = rs.merge(both[..., : rs.WIDTH])
    return replace(out, state=state, target_logits=both[..., rs.WIDTH :].amax(dim=0))


def _model_logprob(
    head: Head, hidden: torch.Tensor, logits: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Float32 [c]: log-probability of the first target, at temperature 1 and top-p 1.

    A pass of its own, so that the others need not carry a second sum.
    """
    begun = Reduction(_first(targets), Transform(head.scale, head.soft_cap))
    done = _reduce(head, hidden, logits, begun)
    return (done.target_logits[:, 0] - rs.log_sum_exp(done.state)).clamp_max(0.0)


def _whole_vocabulary(
    head: Head, logits: torch.Tensor, vocab_size: int
) -> tuple[Head, torch.Tensor]:
    """The logits [c, V] of all ranks, and the head of a rank that has them all."""
    whole = torch.empty(len(logits), vocab_size, dtype=torch.float32, device=logits.device)
    _gather_vocabulary(head, logits.float(), whole)
    alone = replace(head, weight=None, first_id=0, num_ids=vocab_size, gather=None, delta=None)
    return alone, whole


def _threshold(
    head: Head, hidden: torch.Tensor, logits: torch.Tensor | None, out: Reduction
) -> torch.Tensor:
    """Float32 [c]: the x of the one target, whichever rank has it."""
    here = out.at(head.first_id)
    if head.num_ids and logits is not None:
        here.put_targets(head.num_ids, lambda column: out.transform(logits.gather(1, column)))
    elif head.num_ids:
        target_logits(hidden, head.weight, head.bias, here)
    found = here.target_logits
    if head.gather is not None:
        found = head.gather(found).amax(dim=0)
    return found[:, 0].contiguous()


def _top_columns(
    head: Head, x: torch.Tensor, lse: torch.Tensor, layout: RowLayout, out: torch.Tensor
) -> None:
    """The whole vocabulary's log-probabilities, or the most likely ids and theirs."""
    if layout.top == FULL_VOCABULARY:
        x.sub_(lse[:, None])
        if head.gather is None:
            out.copy_(x)
        else:
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
