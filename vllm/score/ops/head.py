"""The product of hidden states and the LM head with float32 logits.

Logits rounded to bfloat16 are the largest error of a score (spacing 0.125 at |logit| 16..32). On
a CPU without bfloat16 instructions the float32 product is several times faster as well.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Rows of the head that are converted to float32 at once.
WEIGHT_TILE_BYTES = 32 << 20

_wanted = threading.local()


@contextmanager
def float32_logits(wanted: bool) -> Iterator[None]:
    """While open, the model's own head gives float32 logits where its weights are plain."""
    before = getattr(_wanted, "now", False)
    _wanted.now = wanted
    try:
        yield
    finally:
        _wanted.now = before


def float32_logits_wanted() -> bool:
    """Whether this thread is inside `float32_logits(True)`."""
    return bool(getattr(_wanted, "now", False))


def prefers_float32_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the float32 product is the better one for a head of this dtype.

    Where the CPU multiplies bfloat16 natively, the model's own head is several times faster.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def head_rule() -> str:
    """The rule of `prefers_float32_product` and what it says here, in words."""
    if prefers_float32_product(torch.bfloat16, torch.device("cpu")):
        return "on the CPU 16-bit weights are multiplied in float32 (no bfloat16 instructions here)"
    return "on the CPU the model's own product (bfloat16 instructions here)"


def head_product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``hidden @ weight.T + bias`` in float32, a tile of the vocabulary at a time.

    Args:
        hidden: [c, H].
        weight: [V, H], any floating dtype.
        bias: [V] or None.

    Returns:
        float32 [c, V].
    """
    rows = hidden.float()
    out = torch.empty(len(rows), len(weight), dtype=torch.float32, device=rows.device)
    tile = max(1, WEIGHT_TILE_BYTES // (4 * weight.shape[1]))
    for first in range(0, len(weight), tile):
        part = slice(first, first + tile)
        torch.mm(rows, weight[part].float().t(), out=out[:, part])
    if bias is not None:
        out += bias.float()
    return out
