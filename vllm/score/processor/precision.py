"""Which dtype a forward pass and the arithmetic on its logits run in."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager
from typing import Any

import torch

from vllm.score.errors import ScoreModeError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
HALVES = (torch.bfloat16, torch.float16)
MATMUL_PRECISIONS = ("highest", "high", "medium")


def apply_global_precision(allow_tf32: bool, matmul_precision: str) -> None:
    """Set how this process multiplies float32 matrices.

    "high" and "medium" stand for TF32 and bfloat16 products, so they take effect only where
    `allow_tf32` permits those; without it every product is a float32 one ("highest").

    Raises:
        ScoreModeError: an unknown `matmul_precision`, which torch itself would pass over.
    """
    if matmul_precision not in MATMUL_PRECISIONS:
        raise ScoreModeError(
            f"matmul_precision must be one of {', '.join(MATMUL_PRECISIONS)}, got "
            f"{matmul_precision!r}."
        )
    torch.set_float32_matmul_precision(matmul_precision if allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = allow_tf32


def forward_precision_ctx(
    autocast: bool, dtype: torch.dtype, device_type: str
) -> AbstractContextManager[Any]:
    """Autocast to `dtype`, or no autocast, whatever surrounds it.

    Raises:
        ScoreModeError: autocast to a dtype that it does not know.
    """
    if not autocast:
        return torch.autocast(device_type, enabled=False)
    if dtype not in HALVES:
        raise ScoreModeError(
            f"autocast to {dtype_name(dtype)} does not exist: set dtype to bfloat16 or float16, or "
            "autocast to False."
        )
    return torch.autocast(device_type, dtype=dtype)


def scoring_dtype(logits: torch.dtype, cast_logits_fp32: bool, fp64: bool = False) -> torch.dtype:
    """The dtype of softmax, log-probabilities and entropies for logits of a dtype.

    Raises:
        ScoreModeError: half-precision logits that may not be cast.
    """
    if fp64:
        return torch.float64
    if logits not in HALVES:
        return logits
    if not cast_logits_fp32:
        raise ScoreModeError(
            f"cast_logits_fp32 is False, but the logits are {dtype_name(logits)}, in which a "
            "log-probability keeps two or three digits: set it to True, or the dtype to float32."
        )
    return torch.float32


def parse_dtype(field: str, value: Any) -> torch.dtype:
    """The floating-point dtype named by a string, or the dtype itself.

    Raises:
        ScoreModeError: names `field`.
    """
    if isinstance(value, torch.dtype) and value in DTYPES.values():
        return value
    name = str(value).removeprefix("torch.")
    if isinstance(value, str) and name in DTYPES:
        return DTYPES[name]
    close = difflib.get_close_matches(name, DTYPES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ScoreModeError(f"{field} must be one of {', '.join(DTYPES)}, got {value!r}{hint}.")


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")
