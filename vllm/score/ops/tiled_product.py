"""The head on a GPU as a product a tile at a time by cuBLAS, each tile reduced in one pass.

The float32 logits of a tile stay in the GPU's L2 cache between the product that writes them and
the reduction that reads them, and the next product overwrites them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Float32 logits of a tile. Half of the L2 cache of an H100 or H200 (50 and 60 MB); more is slower.
WORKSPACE_BYTES = 32 << 20
# Rows of a tile. The larger, the less often the head's weights are read.
TILE_ROWS = 1024
# Tiles are multiples of this in columns: whole tiles of cuBLAS's own.
COLUMN_GRANULE = 256


def tile_shape(rows: int, columns: int, workspace_bytes: int = WORKSPACE_BYTES) -> tuple[int, int]:
    """Rows and columns of a tile, at most `workspace_bytes` of float32 together.

    Args:
        rows: R of the whole product.
        columns: n of the whole product.
    """
    tile_rows = min(rows, TILE_ROWS, max(1, workspace_bytes // (4 * COLUMN_GRANULE)))
    tile_columns = max(1, workspace_bytes // (4 * tile_rows))
    if tile_columns > COLUMN_GRANULE:
        tile_columns -= tile_columns % COLUMN_GRANULE
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
    for first_row in range(0, rows, tile_rows):
        part = slice(first_row, min(rows, first_row + tile_rows))
        h, t, s, f = hidden[part], targets[part], state[part], target_logits[part]
        limit = None if threshold is None else threshold[part]
        for first in range(0, columns, tile_columns):
            w = weight[first : first + tile_columns]
            tile = buffer[: len(h) * len(w)].view(len(h), len(w))
            multiply(h, w, tile)
            if bias is not None:
                tile += bias[first : first + tile_columns]
            reduce_logits(
                tile, t, first_id + first, limit, scale, soft_cap, temperature, statistics, s, f
            )


def multiply(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """``out = hidden @ weight.T``, accumulated and written in float32: [r, H], [c, H], [r, c]."""
    if hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float().t(), out=out)
