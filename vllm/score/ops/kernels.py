"""The operators on a device: which kernels serve it, and how they multiply by a head.

`vllm.score.ops.reference` defines the operators ``torch.ops.vllm_score.*`` for every device. A
compiled library adds kernels for its own, to which torch then dispatches; the libraries lie beside
this file if they were built (setup.py). For other devices, kernels that somebody has registered by
``torch.library.impl`` are checked and used in the same way.

`score_head` has two ways. The fused kernel multiplies and reduces in one pass. The tiled product
leaves the multiplication to torch's library, a tile at a time, and reduces each tile in one pass:
on a GPU the float32 logits of a tile stay in the L2 cache between the product that writes them and
the reduction that reads them, and the next product overwrites them there.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm.score.errors import ScoreModeError
from vllm.score.ops import reference
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction, Transform

KERNEL_VARIABLE = "VLLM_SCORE_KERNEL"
KERNELS = ("auto", "native", "pytorch")
FILES = {"cpu": "_score_cpu.so", "cuda": "_score_cuda.so"}
FOLDER = Path(__file__).parent
# In every library that was built for the operators' present arguments (csrc/bindings.h).
STAMP = b"vllm_score operators 2"

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

# Sizes of the check: enough rows for the fused CUDA kernel in bfloat16; float32 takes the tiled
# product there.
ROWS, COLUMNS, HIDDEN, TARGETS = PAIR_ROWS - 3, 70, 32, 2
MOST = rs.ENTROPY_BIT | rs.COLLISION_BIT | rs.TOP_BIT | rs.MOMENTS_BIT | rs.RANK_BIT
EVERYTHING = MOST | rs.VARENTROPY_BIT
# Sums of 70 terms in float32, in another order.
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)
# Where PyTorch serves though other kernels are registered: its functions, registered above them.
_covers: dict[str, torch.library.Library] = {}


class KernelChoice(NamedTuple):
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


# --- the operators, and the two ways of the head


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
    return (
        "16-bit weights on compute capability 9.0: fused product and reduction for "
        f"{LEAST_ROWS}..{BLOCK_ROWS} rows, from {ALWAYS_FROM_ROWS}, and between them where rows "
        f"fill {SMALL_SHARE:.0%} (hidden size up to {SMALL_HIDDEN}) or {LARGE_SHARE:.0%} (above) "
        f"of their blocks of {PAIR_ROWS}; else, and wherever the varentropy is asked for: tiled, "
        "cuBLAS a tile at a time and one pass over each tile"
    )


def prefers_fused(rows: int, hidden_size: int) -> bool:
    """Whether the fused CUDA kernel should be the faster one: hidden states [rows, hidden_size]."""
    if rows <= BLOCK_ROWS or rows >= ALWAYS_FROM_ROWS:
        return rows >= LEAST_ROWS
    multiplied = -(-rows // PAIR_ROWS) * PAIR_ROWS
    return rows >= (SMALL_SHARE if hidden_size <= SMALL_HIDDEN else LARGE_SHARE) * multiplied


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
    calls: list[tuple[Callable[..., None], tuple[torch.Tensor, ...], int]] = [
        (reduce_logits, (logits,), EVERYTHING),
        # The fused CUDA kernel leaves the varentropy to the tiled product.
        (score_head, operands, MOST),
        (score_head, operands, EVERYTHING),
        (target_logits, operands, 0),
    ]
    for ours, arguments, statistics in calls:
        results = []
        for function in (ours, getattr(reference, ours.__name__)):
            out = Reduction(targets, Transform(1.5, 4.0, 0.75), statistics, threshold)
            function(*arguments, out)
            state = out.state if statistics else out.state[:, :0]
            results.append(torch.cat([state, out.target_logits], dim=1).cpu().double())
        found, expected = results
        # NaN in either is a difference that no tolerance allows.
        yield ours.__name__, float(((found - expected).abs() / (1 + expected.abs())).max())
