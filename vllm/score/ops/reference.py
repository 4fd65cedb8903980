"""The operators: their definition to torch, and what each computes, in plain PyTorch.

torch dispatches a call to the kernel that is registered for the device (`vllm.score.ops.kernels`
loads the compiled ones), and where there is none to the functions here: every device is served.
Every kernel is tested against these functions, and these against float64 NumPy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction, Transform

# Bytes of a block of float32 logits. On a CPU it stays in the caches, because it is read several
# times; on a GPU it bounds the temporaries, of which the statistics need half a dozen.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 8 << 20}
# Columns of the head that are multiplied at once, as float32.
WEIGHT_TILE_BYTES = 16 << 20


def reduce_logits(logits: torch.Tensor, out: Reduction) -> None:
    """Add a tile of logits to the sums of its rows. Over the whole vocabulary, with

        x = out.transform(logits)
        logprobs = F.log_softmax(x, -1).gather(1, out.targets)

    `logprobs` equals ``out.target_logits - log_sum_exp(out.state)[:, None]``.

    Args:
        logits: [R, n], any floating dtype; column j is the id ``out.first_id + j``. Not modified.
        out: targets outside the tile are left alone.
    """
    if logits.shape[1] == 0:
        return
    asked = [columns for bit, columns in rs.COLUMNS_OF.items() if out.statistics & bit]
    written = [rs.MAX, rs.SUM_EXP, *itertools.chain(*asked)]
    block = max(1, BLOCK_BYTES.get(logits.device.type, 8 << 20) // (4 * logits.shape[1]))
    for first in range(0, logits.shape[0], block):
        rows = out.rows(slice(first, first + block))
        x = out.transform(logits[first : first + block])
        rows.put_targets(x.shape[1], partial(x.gather, 1))
        merged = rs.merge(torch.stack([rows.state, _tile_state(x, rows)]))
        rows.state[:, written] = merged[:, written]


def _tile_state(x: torch.Tensor, rows: Reduction) -> torch.Tensor:
    """The state of x [R, n] alone."""
    columns, statistics = x.shape[1], rows.statistics
    place = torch.arange(columns, device=x.device)
    state = Reduction(rows.targets).state
    m = x.amax(1)
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
        best = torch.where(x == m[:, None], place, columns).amin(1).clamp_max(columns - 1)
        state[:, rs.ARGMAX] = (best + rows.first_id).float()
        if columns > 1:
            state[:, rs.SECOND] = torch.topk(x, 2, dim=1).values[:, 1]
    if statistics & rs.MOMENTS_BIT:
        state[:, rs.MEAN] = x.mean(1)
        state[:, rs.M2] = x.var(1, correction=0) * columns
        state[:, rs.COUNT] = columns
    if statistics & rs.RANK_BIT:
        if rows.threshold is None:
            raise ValueError("the rank needs a threshold, the logit of the first target.")
        others = place != rows.targets[:, :1] - rows.first_id
        state[:, rs.RANK] = ((x > rows.threshold[:, None]) & others).sum(1).float()
    return state


def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``hidden @ weight.T + bias``, accumulated and returned in float32: [R, H], [n, H], [n]."""
    if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
        z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        z = torch.mm(hidden.float(), weight.float().t())
    return z if bias is None else z + bias.float()


def score_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: Reduction
) -> None:
    """Add the logits of a part of the head to the sums of the rows, a tile at a time. It equals

        reduce_logits(F.linear(hidden, weight, bias), out)

    Args:
        hidden: [R, H].
        weight: [n, H], row j is the id ``out.first_id + j``.
        bias: [n] or None.
    """
    tile = max(1, WEIGHT_TILE_BYTES // (4 * max(weight.shape[1], hidden.shape[0])))
    for first in range(0, weight.shape[0], tile):
        part = slice(first, first + tile)
        z = product(hidden, weight[part], None if bias is None else bias[part])
        reduce_logits(z, out.at(out.first_id + first))


def target_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: Reduction
) -> None:
    """Write the x of the targets that this part of the head holds. Over the whole vocabulary,

        out.target_logits[:] = out.transform(F.linear(hidden, weight, bias)).gather(1, out.targets)

    Args:
        hidden, weight, bias: as in `score_head`.
        out: its state is left alone, and targets elsewhere.
    """
    if weight.shape[0] == 0:
        return
    block = max(1, WEIGHT_TILE_BYTES // (4 * weight.shape[1] * max(1, out.targets.shape[1])))
    for first in range(0, hidden.shape[0], block):
        h = hidden[first : first + block, None].float()

        def x_at(column: torch.Tensor, h: torch.Tensor = h) -> torch.Tensor:
            z = (weight[column].float() * h).sum(-1)
            return out.transform(z if bias is None else z + bias[column].float())

        out.rows(slice(first, first + block)).put_targets(weight.shape[0], x_at)


# What `Reduction.arguments` gives. `scale` is already divided by the temperature.
_ROWS = (
    "Tensor targets, int first_id, Tensor? threshold, float scale, float soft_cap, "
    "int statistics, Tensor(a!) state, Tensor(b!) target_logits"
)
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
# The compiled libraries are built for these arguments: whoever changes them changes the stamp in
# csrc/bindings.h and in kernels.py.
OPERATORS: dict[str, tuple[str, Callable[..., None]]] = {
    "reduce_logits": (f"(Tensor logits, {_ROWS}) -> ()", reduce_logits),
    "score_head": (f"({_HEAD}, {_ROWS}) -> ()", score_head),
    "target_logits": (f"({_HEAD}, {_ROWS}) -> ()", target_logits),
}


def kernel_of(function: Callable[..., None]) -> Callable[..., None]:
    """A function above as a kernel of its operator, with the operator's arguments."""

    def kernel(*arguments: Any) -> None:
        *operands, targets, first_id, threshold, scale, soft_cap, mask, state, found = arguments
        transform = Transform(scale, soft_cap)
        function(*operands, Reduction(targets, transform, mask, threshold, first_id, state, found))

    return kernel


_library = torch.library.Library("vllm_score", "DEF")
for _name, (_schema, _function) in OPERATORS.items():
    _library.define(_name + _schema)
    _library.impl(_name, kernel_of(_function), "CompositeExplicitAutograd")
    # They write to their arguments and return nothing.
    torch.library.register_fake(f"vllm_score::{_name}", lambda *_: None, lib=_library)
