"""Which kernels serve a kind of device: its own, loaded and checked, or PyTorch's.

`vllm.score.ops.reference` defines the operators ``torch.ops.vllm_score.*`` for every device. A
compiled library adds kernels for its own, to which torch then dispatches; the libraries lie beside
this file if they were built (setup.py). For other devices, kernels that somebody has registered by
``torch.library.impl`` are checked and used in the same way.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vllm.score.errors import ScoreModeError
from vllm.score.ops import head, reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction, Transform

KERNEL_VARIABLE = "VLLM_SCORE_KERNEL"
KERNELS = ("auto", "native", "pytorch")
FILES = {"cpu": "_score_cpu.so", "cuda": "_score_cuda.so"}
FOLDER = Path(__file__).parent
# In every library that was built for the operators' present arguments (csrc/bindings.h).
STAMP = b"vllm_score operators 2"

# Sizes of the check: enough rows for the fused CUDA kernel in bfloat16; float32 takes the tiled
# product there.
ROWS, COLUMNS, HIDDEN, TARGETS = head.PAIR_ROWS - 3, 70, 32, 2
MOST = rs.ENTROPY_BIT | rs.COLLISION_BIT | rs.TOP_BIT | rs.MOMENTS_BIT | rs.RANK_BIT
EVERYTHING = MOST | rs.VARENTROPY_BIT
# Sums of 70 terms in float32, in another order.
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)
# Where PyTorch serves though other kernels are registered: its functions, registered above them.
_covers: dict[str, torch.library.Library] = {}


@dataclass(frozen=True)
class KernelChoice:
    """What serves, "native" or "pytorch", and the reason in words."""

    name: str
    reason: str


# --- the choice


def choose_kernel(device_type: str) -> KernelChoice:
    """Let the kernels asked for serve a kind of device ("cpu", "cuda", ...) from now on.

    VLLM_SCORE_KERNEL says "native", "pytorch" or, by default, "auto": the device's own kernels
    where there are some that pass their check, else PyTorch. The first call for a device loads the
    library and checks it with tiny calls, on a GPU as well: not for a process that must not
    initialise CUDA (see `expected_kernel`).

    Raises:
        ScoreModeError: what is asked for does not exist, is not built or fails its check.
    """
    choice = _choose(device_type, _asked(), True)
    _cover(device_type, choice.name == "pytorch" and registered(device_type))
    return choice


def expected_kernel(device_type: str) -> KernelChoice:
    """What `choose_kernel` will say in a process where the check passes; loads nothing.

    Raises:
        ScoreModeError: as `choose_kernel`, as far as can be told.
    """
    return _choose(device_type, _asked(), False)


def _asked() -> str:
    asked = os.environ.get(KERNEL_VARIABLE) or "auto"
    if asked not in KERNELS:
        raise ScoreModeError(
            f"{KERNEL_VARIABLE}={asked!r} names a kernel that does not exist; "
            f"choose from: {', '.join(KERNELS)}."
        )
    return asked


@cache
def _choose(device_type: str, asked: str, loads: bool) -> KernelChoice:
    if asked == "pytorch":
        return KernelChoice("pytorch", "asked for by name")
    problem = native_problem(device_type) if loads else not_built(device_type)
    if problem is None:
        reason = _describe(device_type) if loads else "compiled; checked where it runs"
        return KernelChoice("native", reason)
    if asked == "native":
        raise ScoreModeError(
            f"{KERNEL_VARIABLE}=native, but {problem}; "
            f"{KERNEL_VARIABLE}=pytorch uses the PyTorch reference."
        )
    if loads:
        logger.warning("Scores are computed by the PyTorch reference: %s.", problem)
    return KernelChoice("pytorch", problem)


@cache
def native_problem(device_type: str) -> str | None:
    """Why the device's own kernels cannot serve it, in words; None if they can."""
    if (problem := load(device_type)) is not None:
        return problem
    _cover(device_type, False)
    if (problem := self_check(device_type)) is not None:
        return f"the kernels failed their check: {problem}"
    return None


def registered(device_type: str) -> bool:
    """Whether torch knows a kernel of an operator that is for this kind of device alone."""
    key = torch._C._dispatch_key_for_device(device_type)
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_score::{name}", key)
        for name in reference.OPERATORS
    )


def _cover(device_type: str, wanted: bool) -> None:
    """Register PyTorch's functions above the device's own kernels, or take them away again."""
    if wanted is (device_type in _covers):
        return
    if not wanted:
        _covers.pop(device_type)._destroy()
        return
    _covers[device_type] = cover = torch.library.Library("vllm_score", "IMPL")
    for name, (_, function) in reference.OPERATORS.items():
        key = torch._C._dispatch_key_for_device(device_type)
        cover.impl(name, reference.kernel_of(function), key)


# --- the compiled libraries


def not_built(device_type: str) -> str | None:
    """Why there is no usable library for a kind of device, in words; loads nothing."""
    if device_type not in FILES:
        if registered(device_type):
            return None
        return f"there are no compiled kernels for the device {device_type!r}"
    path = FOLDER / FILES[device_type]
    if not path.exists():
        return f"{path.name} was not built (VLLM_SCORE_BUILD={device_type} says why not)"
    # Loaded, it would end the process, or be called with arguments that it does not expect.
    if STAMP not in path.read_bytes():
        return (
            f"{path.name} was built from another version's sources; build it again: install "
            "vllm-score anew (a checkout: make install, or pip install -e .)"
        )
    return None


@cache
def load(device_type: str) -> str | None:
    """Load the kernels of a kind of device.

    Returns:
        None if they are there, else the reason why not, in words.
    """
    problem = not_built(device_type)
    if problem is not None or device_type not in FILES:
        return problem
    if device_type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is available"
    path = FOLDER / FILES[device_type]
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    return None


def _describe(device_type: str) -> str:
    if device_type not in FILES:
        return "registered for this device"
    if device_type == "cpu":
        return f"compiled, using {cpu_isa()}"
    return f"compiled for compute capabilities {cuda_targets()}"


def library_function(device_type: str, name: str, result: Any) -> Any:
    """A function that is no operator, e.g. because it gives a string, of a library that is there.

    Args:
        result: its type, by ctypes.
    """
    if (problem := load(device_type)) is not None:
        raise RuntimeError(problem)
    function = ctypes.CDLL(str(FOLDER / FILES[device_type]))[name]
    function.restype = result
    return function


def cpu_isa() -> str:
    """The instruction set that the CPU kernels chose: "amx_bf16", "avx2", ..."""
    return str(library_function("cpu", "vllm_score_cpu_isa", ctypes.c_char_p)().decode())


def cuda_targets() -> str:
    """The compute capabilities that the CUDA kernels were compiled for, e.g. "8.0 9.0"."""
    return str(library_function("cuda", "vllm_score_cuda_targets", ctypes.c_char_p)().decode())


# --- the check


def self_check(device_type: str) -> str | None:
    """Whether a tiny call of each operator gives the reference's numbers on this machine.

    Returns:
        None if so, else what differs, in words.
    """
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for name, difference in _differences(torch.device(device_type), dtype):
                if not difference <= TOLERANCE:
                    return (
                        f"{name} in {str(dtype).removeprefix('torch.')} differs from the PyTorch "
                        f"reference by {difference:.1e}"
                    )
    except RuntimeError as error:
        return f"a call fails: {error}"
    return None


def _differences(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """The operator and the largest difference, relative to 1 + the number itself, of each call."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    operands = (random(ROWS, HIDDEN), random(COLUMNS, HIDDEN), random(COLUMNS))
    logits = random(ROWS, COLUMNS)
    targets = torch.randint(COLUMNS, (ROWS, TARGETS), generator=generator).to(device)
    threshold = torch.zeros(ROWS, device=device)
    calls: list[tuple[str, tuple[torch.Tensor, ...], int]] = [
        ("reduce_logits", (logits,), EVERYTHING),
        # The fused CUDA kernel leaves the varentropy to the tiled product.
        ("score_head", operands, MOST),
        ("score_head", operands, EVERYTHING),
        ("target_logits", operands, 0),
    ]
    for name, arguments, statistics in calls:
        results = []
        for module in (head, reference):
            out = Reduction(targets, Transform(1.5, 4.0, 0.75), statistics, threshold)
            getattr(module, name)(*arguments, out)
            written = (
                [out.target_logits] if name == "target_logits" else [out.state, out.target_logits]
            )
            results.append(torch.cat(written, dim=1).cpu().double())
        ours, expected = results
        # NaN in either is a difference that no tolerance allows.
        yield name, float(((ours - expected).abs() / (1 + expected.abs())).max())
