"""The head on a GPU as a product a tile at a time by cuBLAS, each tile reduced in one pass.

The float32 logits of a tile stay in the GPU's L2 cache between the product that writes them and
the reduction that reads them, and the next product overwrites them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Float32 logits of a tile, 2048 x 5632 for many rows. Larger tiles leave the L2 cache of an H100 or
# H200 (50 and 60 MB); in smaller ones the start and the end of each product weigh more
# (benchmarks/head_kernel.py --sweep).
WORKSPACE_BYTES = 44 << 20
TILE_ROWS = 2048
# Tiles are multiples of this in columns: whole tiles of cuBLAS's own.
COLUMN_GRANULE = 256


def tile_shape(rows: int, columns: int, workspace_bytes: int = WORKSPACE_BYTES) -> tuple[int, int]:
    """Rows and columns of a tile, at most `workspace_bytes` of float32 together.

    Args:
        rows: R of the whole product.
        columns: n of the whole product.
    """
    tile_rows = min(rows, TILE_ROWS, max(1, workspace_bytes // (4 * COLUMN_GRANULE)))
    limit = max(1, workspace_bytes // (4 * tile_rows))
    # Tiles of about one width, whole granules each.
    even = -(-columns // -(-columns // limit))
    tile_columns = -(-even // COLUMN_GRANULE) * COLUMN_GRANULE
    if tile_columns > limit:
        tile_columns = max(1, limit // COLUMN_GRANULE * COLUMN_GRANULE)
    return tile_rows, min(columns, tile_columns)


def score_head_tiled(
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
    *,
    reduce_logits: Callable[..., Any],
    shape: tuple[int, int] | None = None,
) -> None:
    """`score_head` of the reference by products of tiles, on any device.

    Args:
        hidden ... target_logits: as in `vllm.score.ops.reference.score_head`.
        reduce_logits: reduces a tile, with the arguments of the reference's.
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
        h, t, s, f = hidden[part], targets[part], state[part], target_logits[part]
        limit = None if threshold is None else threshold[part]
        tile = _tile(buffer, h, heads[0])
        first = first_id
        for number, w in enumerate(heads):
            if number and number == len(heads) - 1:
                tile = _tile(buffer, h, w)
            multiply(h, w, tile)
            if biases is not None:
                tile += biases[number]
            reduce_logits(tile, t, first, limit, scale, soft_cap, temperature, statistics, s, f)
            first += tile_columns


def _tile(buffer: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows, columns = len(hidden), len(weight)
    return buffer[: rows * columns].view(rows, columns)


def multiply(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out = hidden @ weight.T``, accumulated and written in float32: [r, H], [c, H], [r, c]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)
