"""The compiled operators behind the names and arguments of the PyTorch reference.

`score_head` chooses: one fused kernel, or a product by torch's library a tile at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm.score.ops import reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.size_rules import prefers_fused, rules_in_words
from vllm.score.ops.tiled_product import score_head_tiled

# The fused CUDA kernel is for this compute capability and 16-bit weights whose rows start at
# multiples of 16 bytes.
FUSED_CAPABILITY = (9, 0)


def head_rule(device_type: str) -> str:
    """How `score_head` chooses its path on a kind of device, in words."""
    if device_type != "cuda":
        return "float32 and bfloat16 weights: fused product and reduction; others: PyTorch"
    return (
        "16-bit weights on compute capability 9.0: by size, fused product and reduction or tiled ("
        + "; ".join(rules_in_words())
        + "); others, and wherever the varentropy is asked for: tiled, cuBLAS a tile at a time and "
        "one pass over each tile"
    )


def head_path(hidden: torch.Tensor, weight: torch.Tensor, statistics: int = 0) -> str:
    """ "fused" or "tiled", by the rule above: hidden [R, H], weight [n, H], bits of `row_state`."""
    if not hidden.is_cuda:
        return "fused" if hidden.dtype in (torch.float32, torch.bfloat16) else "tiled"
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        return "tiled"
    # It takes a second pass over the exponentials, and the fused kernel's registers are all in use.
    if statistics & rs.VARENTROPY_BIT:
        return "tiled"
    if not prefers_fused(*hidden.shape):
        return "tiled"
    if torch.cuda.get_device_capability(hidden.device) != FUSED_CAPABILITY:
        return "tiled"
    aligned = all(
        m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 and m.stride(1) == 1
        for m in (hidden, weight)
    )
    return "fused" if aligned else "tiled"


def reduce_logits(*arguments: Any) -> None:
    """With the arguments of `vllm.score.ops.reference.reduce_logits`, by position."""
    torch.ops.vllm_score.reduce_logits(*arguments)


def score_head(hidden: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    """With the arguments of `vllm.score.ops.reference.score_head`, by position."""
    *_, statistics, _state, _target_logits = rest
    if head_path(hidden, weight, statistics) == "fused":
        torch.ops.vllm_score.score_head(hidden, weight, *rest)
    else:
        reduce = torch.ops.vllm_score.reduce_logits.default
        score_head_tiled(hidden, weight, *rest, reduce_logits=reduce)


def target_logits(hidden: torch.Tensor, *rest: Any) -> None:
    """With the arguments of `vllm.score.ops.reference.target_logits`, by position."""
    served = hidden.is_cuda or hidden.dtype in (torch.float32, torch.bfloat16)
    function = torch.ops.vllm_score.target_logits if served else reference.target_logits
    function(hidden, *rest)
