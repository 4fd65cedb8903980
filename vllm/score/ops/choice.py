"""Which implementation of the operators runs on a device, and why."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

from vllm.score.errors import ScoreModeError

KERNEL_VARIABLE = "VLLM_SCORE_KERNEL"
KERNELS = ("native", "pytorch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelChoice:
    """The implementation that is used, and the reason in words."""

    name: str
    reason: str


def choose_kernel(device_type: str = "cpu", name: str | None = None) -> KernelChoice:
    """The implementation for a kind of device.

    The first call for a device loads the library and checks it with tiny calls, on a GPU as well:
    not for a process that must not initialise CUDA (see `expected_kernel`).

    Args:
        device_type: of the tensors: "cpu", "cuda".
        name: "native", "pytorch" or "auto"; None: VLLM_SCORE_KERNEL, else "auto", which is the
            compiled kernels where they were built and pass the check, else PyTorch.

    Raises:
        ScoreModeError: an implementation is asked for that does not exist, is not built or fails
            its check.
    """
    return _choose(device_type, asked_kernel(name))


def asked_kernel(name: str | None = None) -> str:
    """The name asked for: "auto", "native" or "pytorch"."""
    asked = name or os.environ.get(KERNEL_VARIABLE) or "auto"
    if asked != "auto" and asked not in KERNELS:
        raise ScoreModeError(
            f"{KERNEL_VARIABLE}={asked!r} names a kernel that does not exist; "
            f"choose from: auto, {', '.join(KERNELS)}."
        )
    return asked


def expected_kernel(device_type: str) -> KernelChoice:
    """What `choose_kernel` will say in a process where the check passes; loads nothing.

    Raises:
        ScoreModeError: as `choose_kernel`, as far as can be told.
    """
    from vllm.score.ops import library

    asked = asked_kernel()
    if asked == "pytorch":
        return KernelChoice("pytorch", "asked for by name")
    if not library.is_built(device_type):
        problem = library.not_built(device_type)
        if asked == "native":
            raise _refusal(problem)
        return KernelChoice("pytorch", problem)
    return KernelChoice("native", "compiled; checked where it runs")


def _refusal(problem: str) -> ScoreModeError:
    return ScoreModeError(
        f"{KERNEL_VARIABLE}=native, but {problem}; "
        f"{KERNEL_VARIABLE}=pytorch uses the PyTorch reference."
    )


@cache
def _choose(device_type: str, asked: str) -> KernelChoice:
    if asked == "pytorch":
        return KernelChoice("pytorch", "asked for by name")
    problem = native_problem(device_type)
    if problem is None:
        return KernelChoice("native", _describe(device_type))
    if asked == "native":
        raise _refusal(problem)
    logger.warning("Scores are computed by the PyTorch reference: %s.", problem)
    return KernelChoice("pytorch", problem)


@cache
def native_problem(device_type: str) -> str | None:
    """Why the compiled kernels cannot serve a kind of device, in words; None if they can."""
    from vllm.score.ops import library

    problem = library.load(device_type)
    if problem is None:
        from vllm.score.ops.self_check import self_check

        problem = self_check(device_type)
        if problem is not None:
            problem = f"the compiled kernels failed their check: {problem}"
    return problem


def _describe(device_type: str) -> str:
    from vllm.score.ops import library

    if device_type == "cuda":
        return f"compiled for compute capabilities {library.cuda_targets()}"
    return f"compiled, using {library.cpu_isa()}"
