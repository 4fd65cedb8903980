"""Hidden states to scores: the one place where the head's product, its reduction and the exchange
between ranks come together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.kernels import choose_kernel, reduce_logits, score_head, target_logits
from vllm.score.ops.row_state import Reduction, Transform
from vllm.score.ops.statistics import FULL_VOCABULARY, RowLayout, score_columns, statistics_mask
from vllm.score.ops.top_p import reduce_nucleus

# Rows whose states are held at once. Their hidden states are gathered only where they are not
# consecutive, so this bounds that copy as well.
MAX_BLOCK_ROWS = 16_384
GATHERED_BYTES = 32 << 20
# Logits that are held at once where the head's own product or a whole row is needed.
LOGITS_BYTES = 48 << 20


@dataclass(frozen=True)
class Head:
    """The logits ``scale * cap(hidden @ weight.T + bias)`` of a contiguous range of token ids.

    Attributes:
        weight: [n, H] plain weights; None where only `logits_of` knows them (quantised, hooked).
        bias: [n] or None.
        logits_of: hidden states [c, H] to raw logits [c, at least n] of this range.
        first_id: id of the first row.
        num_ids: n, vocabulary padding left out; may be 0 on the last rank.
        scale, soft_cap: of the model; a soft cap of 0 means none.
        gather: all-gathers [c, ...] of every rank to [P, c, ...]; None when this rank has all ids.
        delta: what adapters add to the raw logits of these rows, [c, H] to float32 [c, n]; None
            where they add nothing.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    first_id: int
    num_ids: int
    scale: float = 1.0
    soft_cap: float = 0.0
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    delta: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether the rows' logits have to be held: the weights alone do not give them."""
        return self.weight is None or self.delta is not None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This range's raw logits [c, n], float32 where the weights are plain."""
        logits = self.logits_of(hidden)[:, : self.num_ids]
        return logits if self.delta is None else self.delta(hidden).add_(logits)


def block_rows(needs_logits: bool, layout: RowLayout, vocab_size: int, hidden_bytes: int) -> int:
    """Rows scored at once, so that scoring takes less than 128 MiB beside the model.

    The same on every rank, whatever its share of the vocabulary: they exchange block by block.

    Args:
        needs_logits: `Head.needs_logits`.
        vocab_size: of the model.
        hidden_bytes: of one hidden state that has to be copied; 0 where it need not be.
    """
    held = vocab_size if needs_logits or layout.needs_logits else 0
    if layout.needs_logits:
        # Beside the logits, the results of the block before or, with top-p, a copy.
        held += max(layout.width(vocab_size), vocab_size if layout.top_p < 1 else 0)
    by_copy, by_logits = GATHERED_BYTES // max(1, hidden_bytes), LOGITS_BYTES // max(1, 4 * held)
    return max(1, min(MAX_BLOCK_ROWS, by_copy, by_logits))


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
    if logits is not None and layout.top_p < 1 and head.gather is not None:
        own = logits.float()
        logits = torch.empty(len(own), vocab_size, dtype=torch.float32, device=own.device)
        _gather_vocabulary(head, own, logits)
        head = replace(head, first_id=0, num_ids=vocab_size, gather=None)
    first = targets[:, :1].contiguous()
    threshold = None
    if mask & rs.RANK_BIT:
        threshold = _threshold(head, hidden, logits, Reduction(first, transform))
    given = {}
    if "model_logprob" in layout.statistics:
        # A pass of its own, so that the others need not carry a second sum.
        begun = Reduction(first, Transform(head.scale, head.soft_cap))
        whole = _reduce(head, hidden, logits, begun)
        logprob = whole.target_logits[:, 0] - rs.log_sum_exp(whole.state)
        given["model_logprob"] = logprob.clamp_max(0.0)
    x = transform(logits) if layout.needs_logits else None
    if layout.top_p < 1:
        done = Reduction(targets, statistics=mask, threshold=threshold)
        given["head_mass"] = reduce_nucleus(x, layout.top_p, done)
    else:
        done = _reduce(head, hidden, logits, Reduction(targets, transform, mask, threshold))
        given["head_mass"] = torch.ones_like(done.state[:, 0])
    width = layout.width(vocab_size)
    out = torch.empty(len(hidden), width, dtype=torch.float32, device=hidden.device)
    score_columns(done, layout, out, given)
    if layout.top:
        _top_columns(head, x, rs.log_sum_exp(done.state), layout, out[:, layout.top_start :])
    return out


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
