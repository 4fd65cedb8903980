"""The compiled operators: loading them, once a process, and what they say about themselves.

``_score_cpu.so`` defines the operators ``torch.ops.vllm_score.*`` and their CPU kernels,
``_score_cuda.so`` adds the CUDA kernels. Both lie beside this file if they were built (setup.py).
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch

FILES = {"cpu": "_score_cpu.so", "cuda": "_score_cuda.so"}
FOLDER = Path(__file__).parent
OPERATORS = ("reduce_logits", "score_head", "target_logits")

_lock = threading.Lock()
# Why a library is not there, in words; None: it is loaded.
_outcomes: dict[str, str | None] = {}
_handles: dict[str, ctypes.CDLL] = {}


def is_built(device_type: str) -> bool:
    """Whether the library for "cpu" or "cuda" was built; loads nothing."""
    return device_type in FILES and (FOLDER / FILES[device_type]).exists()


def not_built(device_type: str) -> str:
    """Why there is no library for a kind of device, in words."""
    if device_type not in FILES:
        return f"there are no compiled kernels for the device {device_type!r}"
    return f"{FILES[device_type]} was not built (VLLM_SCORE_BUILD={device_type} says why not)"


def load(device_type: str) -> str | None:
    """Load the operators of a kind of device.

    Returns:
        None if they are there, else the reason why not, in words.
    """
    with _lock:
        if device_type not in _outcomes:
            _outcomes[device_type] = _load(device_type)
        return _outcomes[device_type]


def _load(device_type: str) -> str | None:
    if not is_built(device_type):
        return not_built(device_type)
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "no CUDA device is available"
        # It defines the operators.
        if "cpu" not in _outcomes:
            _outcomes["cpu"] = _load("cpu")
        if (problem := _outcomes["cpu"]) is not None:
            return problem
    path = FOLDER / FILES[device_type]
    try:
        torch.ops.load_library(str(path))
        _handles[device_type] = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error.__cause__ or error}"
    if device_type == "cpu":
        for name in OPERATORS:
            # They write to their arguments and return nothing.
            torch.library.register_fake(f"vllm_score::{name}", lambda *_: None)
    return None


def _handle(device_type: str) -> ctypes.CDLL:
    if (problem := load(device_type)) is not None:
        raise RuntimeError(problem)
    return _handles[device_type]


def cpu_isa() -> str:
    """The instruction set that the CPU kernels chose: "amx_bf16", "avx2", ..."""
    function = _handle("cpu").vllm_score_cpu_isa
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()


def set_cpu_isa(name: str) -> bool:
    """For tests: use this instruction set from now on; False when this CPU cannot."""
    function = _handle("cpu").vllm_score_set_cpu_isa
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_char_p]
    return bool(function(name.encode()))


def cuda_targets() -> str:
    """The compute capabilities that the CUDA kernels were compiled for, as "8.0 9.0"."""
    function = _handle("cuda").vllm_score_cuda_targets
    function.restype = ctypes.c_char_p
    return bytes(function()).decode()
