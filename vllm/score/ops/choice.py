"""Which implementation of the reduction runs, and why."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vllm.score.errors import ScoreModeError

KERNEL_VARIABLE = "VLLM_SCORE_KERNEL"
KERNELS = ("pytorch",)


@dataclass(frozen=True)
class KernelChoice:
    """The implementation that is used, and the reason in words."""

    name: str
    reason: str


def choose_kernel(name: str | None = None) -> KernelChoice:
    """The implementation asked for by `name`, else by VLLM_SCORE_KERNEL, else the best one built.

    Raises:
        ScoreModeError: an implementation is asked for that does not exist or is not built.
    """
    asked = name or os.environ.get(KERNEL_VARIABLE) or "auto"
    if asked == "auto":
        return KernelChoice("pytorch", "the only implementation in this version")
    if asked not in KERNELS:
        raise ScoreModeError(
            f"{KERNEL_VARIABLE}={asked!r} names a kernel that is not built; "
            f"choose from: auto, {', '.join(KERNELS)}."
        )
    return KernelChoice(asked, "asked for by name")
