"""The operators of the native library in plain PyTorch: same arguments, same results, any device.

Every kernel is tested against this one, and this one against float64 NumPy. It is also what runs
where nothing was compiled.
"""

from __future__ import annotations

import torch

from vllm.score.ops import row_state as rs

# Bytes of a block of float32 logits. On a CPU it stays in the caches, because it is read several
# times; on a GPU it bounds the temporaries, of which the statistics need half a dozen.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 8 << 20}
# Columns of the head that are multiplied at once, as float32.
WEIGHT_TILE_BYTES = 16 << 20


def transform(z: torch.Tensor, scale: float, soft_cap: float, temperature: float) -> torch.Tensor:
    """Raw logits to ``x = scale * cap(z) / temperature``, float32; ``soft_cap`` 0 means none."""
    x = z.float()
    if soft_cap > 0:
        x = torch.tanh(x / soft_cap) * soft_cap
    factor = scale / temperature
    return x if factor == 1.0 else x * factor


def reduce_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    first_id: int,
    threshold: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    temperature: float,
    statistics: int,
    state: torch.Tensor,
    target_logits: torch.Tensor,
) -> None:
    """Merge a tile of logits into the rows' states, in place.

    Args:
        logits: [R, n], any floating dtype; column j is the id ``first_id + j``. Not modified.
        targets: int64 [R, k], ids of the whole vocabulary; those outside the tile are left alone.
        first_id: of the tile.
        threshold: float32 [R], the (transformed) logit of the first target; with RANK_BIT only.
        scale, soft_cap, temperature: see `transform`.
        statistics: bits of `row_state`.
        state: float32 [R, 11], see `row_state`.
        target_logits: float32 [R, k].
    """
    columns = logits.shape[1]
    if columns == 0:
        return
    block = max(1, BLOCK_BYTES.get(logits.device.type, 8 << 20) // (4 * columns))
    for first in range(0, logits.shape[0], block):
        part = slice(first, first + block)
        x = transform(logits[part], scale, soft_cap, temperature)
        inside = targets[part] - first_id
        held = (inside >= 0) & (inside < columns)
        found = x.gather(1, inside.clamp(0, columns - 1))
        target_logits[part] = torch.where(held, found, target_logits[part])
        tile = _tile_state(
            x, inside[:, :1], first_id, None if threshold is None else threshold[part], statistics
        )
        merged = rs.merge(torch.stack([state[part], tile]))
        for column in _columns(statistics):
            state[part, column] = merged[:, column]


def _columns(statistics: int) -> list[int]:
    columns = [rs.MAX, rs.SUM_EXP]
    for bit, names in (
        (rs.ENTROPY_BIT, [rs.SUM_EXP_X]),
        (rs.VARENTROPY_BIT, [rs.SUM_EXP_DEV2]),
        (rs.COLLISION_BIT, [rs.SUM_EXP2]),
        (rs.TOP_BIT, [rs.SECOND, rs.ARGMAX]),
        (rs.MOMENTS_BIT, [rs.MEAN, rs.M2, rs.COUNT]),
        (rs.RANK_BIT, [rs.RANK]),
    ):
        if statistics & bit:
            columns += names
    return columns


def _tile_state(
    x: torch.Tensor,
    own: torch.Tensor,
    first_id: int,
    threshold: torch.Tensor | None,
    statistics: int,
) -> torch.Tensor:
    rows, columns = x.shape
    state = rs.new_state(rows, x.device)
    m, best = x.max(dim=1)
    state[:, rs.MAX] = m
    # A row of -inf alone has no maximum to subtract.
    shifted = x - torch.where(m == float("-inf"), 0.0, m)[:, None]
    e = shifted.exp()
    state[:, rs.SUM_EXP] = e.sum(1)
    if statistics & rs.ENTROPY_BIT:
        state[:, rs.SUM_EXP_X] = torch.where(e > 0, e * shifted, 0.0).sum(1)
    if statistics & rs.VARENTROPY_BIT:
        if not statistics & rs.ENTROPY_BIT:
            raise ValueError("the varentropy needs the entropy's bit as well.")
        apart = shifted - (state[:, rs.SUM_EXP_X] / state[:, rs.SUM_EXP])[:, None]
        state[:, rs.SUM_EXP_DEV2] = torch.where(e > 0, e * apart * apart, 0.0).sum(1)
    if statistics & rs.COLLISION_BIT:
        state[:, rs.SUM_EXP2] = (e * e).sum(1)
    if statistics & rs.TOP_BIT:
        # torch.max may point at any of several equal maxima.
        place = torch.arange(columns, device=x.device)
        best = torch.where(x == m[:, None], place, columns).amin(1).clamp_max(columns - 1)
        state[:, rs.ARGMAX] = (best + first_id).float()
        if columns > 1:
            state[:, rs.SECOND] = torch.topk(x, 2, dim=1).values[:, 1]
    if statistics & rs.MOMENTS_BIT:
        state[:, rs.MEAN] = x.mean(1)
        state[:, rs.M2] = x.var(1, correction=0) * columns
        state[:, rs.COUNT] = columns
    if statistics & rs.RANK_BIT:
        if threshold is None:
            raise ValueError("the rank needs a threshold, the logit of the first target.")
        larger = x > threshold[:, None]
        place = torch.arange(columns, device=x.device)
        state[:, rs.RANK] = (larger & (place != own)).sum(1).float()
    return state


def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``hidden @ weight.T + bias``, accumulated and returned in float32: [R, H], [n, H], [n]."""
    if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = torch.mm(hidden.float(), weight.float().t())
    return z if bias is None else z + bias.float()


def score_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    first_id: int,
    threshold: torch.Tensor | None,
    scale: float,
    soft_cap: float,
    temperature: float,
    statistics: int,
    state: torch.Tensor,
    target_logits: torch.Tensor,
) -> None:
    """The product with the head's rows ``weight`` [n, H] and `reduce_logits`, a tile at a time."""
    tile = max(1, WEIGHT_TILE_BYTES // (4 * max(weight.shape[1], hidden.shape[0])))
    for first in range(0, weight.shape[0], tile):
        part = slice(first, first + tile)
        reduce_logits(
            product(hidden, weight[part], None if bias is None else bias[part]),
            targets,
            first_id + first,
            threshold,
            scale,
            soft_cap,
            temperature,
            statistics,
            state,
            target_logits,
        )


def target_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    first_id: int,
    scale: float,
    soft_cap: float,
    temperature: float,
    out: torch.Tensor,
) -> None:
    """Write the transformed logits of the targets that this shard of the head holds.

    Args:
        hidden: [R, H].
        weight: [n, H], row j is the id ``first_id + j``.
        bias: [n] or None.
        targets: int64 [R, k].
        first_id, scale, soft_cap, temperature: as in `reduce_logits`.
        out: float32 [R, k]; entries whose target is elsewhere are left alone.
    """
    if weight.shape[0] == 0:
        return
    block = max(1, WEIGHT_TILE_BYTES // (4 * weight.shape[1] * max(1, targets.shape[1])))
    for first in range(0, hidden.shape[0], block):
        part = slice(first, first + block)
        inside = targets[part] - first_id
        held = (inside >= 0) & (inside < weight.shape[0])
        inside = inside.clamp(0, weight.shape[0] - 1)
        z = (weight[inside].float() * hidden[part, None].float()).sum(-1)
        if bias is not None:
            z = z + bias[inside].float()
        x = transform(z, scale, soft_cap, temperature)
        out[part] = torch.where(held, x, out[part])
