"""The operators that serve a device: the compiled ones, or the PyTorch reference."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm.score.ops.choice import choose_kernel


@cache
def operators(device_type: str) -> Any:
    """A module with `reduce_logits`, `score_head` and `target_logits` for "cpu", "cuda", ..."""
    if choose_kernel(device_type).name == "native":
        from vllm.score.ops import native

        return native
    from vllm.score.ops import reference

    return reference
