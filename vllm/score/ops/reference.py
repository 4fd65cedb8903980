"""The reduction of logit rows to scores, in plain PyTorch; runs on any device.

Every kernel is tested against this one, and this one against float64 NumPy.
"""

from __future__ import annotations

import torch

from vllm.score.engine.layout import FULL_VOCABULARY, RowLayout

# Bytes of a block of float32 rows. On a CPU it stays in the caches, because it is read several
# times; on a GPU it bounds the temporaries, of which the statistics need half a dozen.
BLOCK_BYTES = {"cpu": 2 << 20, "other": 16 << 20}


def reduce_logits(logits: torch.Tensor, targets: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """Reduce rows of logits to the columns of `layout`, in float32.

    Args:
        logits: [R, V], any floating dtype, vocabulary padding already cut off. Not modified.
        targets: int64 [R, k], ids within 0..V-1.
        layout: what to compute.

    Returns:
        float32 [R, layout.width(V)], on the logits' device.
    """
    rows, vocab_size = logits.shape
    out = torch.empty(rows, layout.width(vocab_size), dtype=torch.float32, device=logits.device)
    budget = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["other"])
    block = max(1, budget // (4 * vocab_size))
    for first in range(0, rows, block):
        part = slice(first, first + block)
        _reduce_block(logits[part], targets[part], layout, out[part])
    return out


def _reduce_block(
    logits: torch.Tensor, targets: torch.Tensor, layout: RowLayout, out: torch.Tensor
) -> None:
    x = logits.float()
    if layout.temperature != 1.0:
        x = x / layout.temperature
    logprobs = torch.log_softmax(x, dim=-1)
    if layout.num_targets:
        torch.gather(logprobs, 1, targets, out=out[:, : layout.num_targets])
    if layout.statistics:
        _statistics(
            x, logprobs, targets[:, :1], layout.statistics, out[:, layout.statistics_columns]
        )
    if layout.top == FULL_VOCABULARY:
        out[:, layout.top_start :] = logprobs
    elif layout.top:
        values, ids = torch.topk(logprobs, layout.top, dim=-1)
        first, second = layout.top_start, layout.top_start + layout.top
        out[:, first:second] = ids.float()
        out[:, second:] = values


def _statistics(
    x: torch.Tensor,
    logprobs: torch.Tensor,
    target: torch.Tensor,
    names: tuple[str, ...],
    out: torch.Tensor,
) -> None:
    best = logprobs.max(dim=-1)
    for column, name in enumerate(names):
        if name == "entropy":
            value = torch.special.entr(logprobs.exp()).sum(-1)
        elif name == "rank":
            value = (x > x.gather(1, target)).sum(-1).float() + 1
        elif name == "argmax":
            value = best.indices.float()
        elif name == "argmax_logprob":
            value = best.values
        elif name == "margin":
            value = best.values - second_largest(logprobs)
        elif name == "collision_probability":
            value = (2 * logprobs).exp().sum(-1)
        elif name == "logit_mean":
            value = x.mean(-1)
        elif name == "logit_variance":
            value = x.var(-1, correction=0)
        else:
            raise ValueError(f"the PyTorch reference does not compute the statistic {name!r}.")
        out[:, column] = value


def second_largest(values: torch.Tensor) -> torch.Tensor:
    """The second largest of each row, [R]; -inf where a row has one entry only."""
    if values.shape[-1] < 2:
        return torch.full_like(values[:, 0], float("-inf"))
    return torch.topk(values, 2, dim=-1).values[:, 1]
