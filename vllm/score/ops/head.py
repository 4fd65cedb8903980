"""One rank's part of a language-model head, and how its product is made and reduced.

`score_head` has two ways. The fused kernel multiplies and reduces in one pass. The tiled product
leaves the multiplication to torch's library, a tile at a time, and reduces each tile in one pass:
on a GPU the float32 logits of a tile stay in the L2 cache between the product that writes them and
the reduction that reads them, and the next product overwrites them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch

from vllm.score.ops import reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction

# The fused CUDA kernel is for this compute capability and 16-bit weights whose rows start at
# multiples of 16 bytes.
FUSED_CAPABILITY = (9, 0)
# It multiplies 256 rows at a time (128, where there are no more), whether all of them exist or not,
# so what decides is the share of its rows that do. Where the hidden size is small the tiled product
# spends much of its time on writing and reading logits, so a smaller share is enough. Measured on
# one H200 with bfloat16 and random operands: tests/ops/test_head_rule.py has the figures, the note
# benchmarks/notes/fused_head_sm90.md and benchmarks/head_kernel.py --sizes say how.
BLOCK_ROWS, PAIR_ROWS = 128, 256
# With fewer rows reading the weights takes all the time, and cuBLAS reads them faster.
LEAST_ROWS = 64
# From here on so few rows are missing that the fused kernel always serves.
ALWAYS_FROM_ROWS = 1024
# Up to this hidden size, and above it: the least share of the rows multiplied that must exist.
SMALL_HIDDEN = 1536
SMALL_SHARE, LARGE_SHARE = 0.6, 0.8

# Float32 logits of a tile, 2048 x 5632 for many rows. Larger tiles leave the L2 cache of an H100 or
# H200 (50 and 60 MB); in smaller ones the start and the end of each product weigh more
# (benchmarks/head_kernel.py --sweep).
WORKSPACE_BYTES = 44 << 20
TILE_ROWS = 2048
# Tiles are multiples of this in columns: whole tiles of cuBLAS's own.
COLUMN_GRANULE = 256


@dataclass(frozen=True)
class Head:
    """The logits ``scale * cap(hidden @ weight.T + bias)`` of a contiguous range of token ids.

    Attributes:
        weight: [n, H] plain weights; None where only `logits_of` knows them (quantised, adapted).
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
        if self.weight is None:
            logits = self.logits_of(hidden)[:, : self.num_ids]
        else:
            logits = reference.product(hidden, self.weight, self.bias)
        return logits if self.delta is None else self.delta(hidden).add_(logits)


def reduce_logits(logits: torch.Tensor, out: Reduction) -> None:
    """`vllm.score.ops.reference.reduce_logits` by the kernel of the device."""
    torch.ops.vllm_score.reduce_logits(logits, *out.arguments)


def score_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: Reduction
) -> None:
    """`vllm.score.ops.reference.score_head` by the kernels of the device, fused or tiled."""
    if head_path(hidden, weight, out.statistics) == "fused":
        torch.ops.vllm_score.score_head(hidden, weight, bias, *out.arguments)
    else:
        score_head_tiled(hidden, weight, bias, out)


def target_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: Reduction
) -> None:
    """`vllm.score.ops.reference.target_logits` by the kernel of the device."""
    if hidden.device.type == "cpu" and hidden.dtype == torch.float16:  # not compiled for it
        reference.target_logits(hidden, weight, bias, out)
    else:
        torch.ops.vllm_score.target_logits(hidden, weight, bias, *out.arguments)


def head_path(hidden: torch.Tensor, weight: torch.Tensor, statistics: int = 0) -> str:
    """ "fused" or "tiled", by the rule below: hidden [R, H], weight [n, H], bits of `row_state`."""
    if hidden.device.type == "cpu":
        return "fused" if hidden.dtype in (torch.float32, torch.bfloat16) else "tiled"
    fused = (
        hidden.is_cuda
        and hidden.dtype in (torch.bfloat16, torch.float16)
        # It takes a second pass over the exponentials, and the fused kernel's registers are in use.
        and not statistics & rs.VARENTROPY_BIT
        and prefers_fused(*hidden.shape)
        and torch.cuda.get_device_capability(hidden.device) == FUSED_CAPABILITY
        and all(
            m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 and m.stride(1) == 1
            for m in (hidden, weight)
        )
    )
    return "fused" if fused else "tiled"


def head_rule(device_type: str) -> str:
    """How `score_head` chooses its path on a kind of device, in words."""
    if device_type == "cpu":
        return "float32 and bfloat16 weights: fused product and reduction; others: PyTorch"
    if device_type != "cuda":
        return "tiled: torch's product a tile at a time and one pass over each tile"
    rules = []
    for hidden_size, limit in ((SMALL_HIDDEN, "up to"), (SMALL_HIDDEN + 1, "above")):
        rows = ", ".join(
            f"from {first}" if last is None else f"{first}..{last}"
            for first, last in fused_ranges(hidden_size)
        )
        rules.append(f"hidden size {limit} {SMALL_HIDDEN}: fused for {rows} rows, else tiled")
    return (
        "16-bit weights on compute capability 9.0: by size, fused product and reduction or tiled ("
        + "; ".join(rules)
        + "); others, and wherever the varentropy is asked for: tiled, cuBLAS a tile at a time and "
        "one pass over each tile"
    )


def prefers_fused(rows: int, hidden_size: int) -> bool:
    """Whether the fused CUDA kernel should be the faster one: hidden states [rows, hidden_size]."""
    if rows <= BLOCK_ROWS or rows >= ALWAYS_FROM_ROWS:
        return rows >= LEAST_ROWS
    multiplied = -(-rows // PAIR_ROWS) * PAIR_ROWS
    return rows >= (SMALL_SHARE if hidden_size <= SMALL_HIDDEN else LARGE_SHARE) * multiplied


def fused_ranges(hidden_size: int) -> list[tuple[int, int | None]]:
    """The numbers of rows, (first, last) with None for no end, that the fused kernel serves."""
    ranges: list[tuple[int, int | None]] = []
    numbers = range(1, ALWAYS_FROM_ROWS + 1)
    for fused, group in groupby(numbers, lambda rows: prefers_fused(rows, hidden_size)):
        rows = list(group)
        if fused:
            ranges.append((rows[0], None if rows[-1] == ALWAYS_FROM_ROWS else rows[-1]))
    return ranges


def score_head_tiled(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: Reduction,
    shape: tuple[int, int] | None = None,
) -> None:
    """`vllm.score.ops.reference.score_head` by products of tiles, on any device.

    Args:
        shape: rows and columns of a tile; None chooses.
    """
    rows, columns = len(hidden), len(weight)
    if rows == 0 or columns == 0:
        return
    tile_rows, tile_columns = shape or tile_shape(rows, columns)
    buffer = torch.empty(tile_rows * tile_columns, dtype=torch.float32, device=hidden.device)
    # Views are made once: for a small head, Python would take longer than the GPU.
    heads = weight.split(tile_columns)
    biases = None if bias is None else bias.split(tile_columns)
    for first_row in range(0, rows, tile_rows):
        part = slice(first_row, min(rows, first_row + tile_rows))
        h, sums = hidden[part], out.rows(part)
        for number, w in enumerate(heads):
            if number in (0, len(heads) - 1):
                tile = buffer[: len(h) * len(w)].view(len(h), len(w))
            multiply(h, w, tile)
            if biases is not None:
                tile += biases[number]
            reduce_logits(tile, sums.at(out.first_id + number * tile_columns))


def tile_shape(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, at most `WORKSPACE_BYTES` of float32 together.

    Args:
        rows: R of the whole product.
        columns: n of the whole product.
    """
    tile_rows = min(rows, TILE_ROWS)
    limit = WORKSPACE_BYTES // (4 * tile_rows)
    # Tiles of about one width, whole granules each.
    even = -(-columns // -(-columns // limit))
    granules = min(-(-even // COLUMN_GRANULE), limit // COLUMN_GRANULE)
    return tile_rows, min(columns, granules * COLUMN_GRANULE)


def multiply(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out = hidden @ weight.T``, accumulated and written in float32: [r, H], [c, H], [r, c]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)
