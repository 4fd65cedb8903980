"""Whether this machine's vLLM multiplies quantised numbers rightly, measured on one product."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def cpu_int8_error(largest_weight: int = 127) -> float:
    """Error of vLLM's int8 product on this CPU, relative to the product's standard deviation.

    int8 products are sums of whole numbers, so 0 is what to expect. On x86 without VNNI
    instructions oneDNN adds pairs of products in 16 bits, which overflow (and stay at 32,767) when
    two weights beyond ±64 meet large inputs: stock generation and scores alike are then those of
    another model.

    Args:
        largest_weight: weights are drawn from -largest_weight..largest_weight.
    """
    import torch

    from vllm import _custom_ops as ops

    generator = torch.Generator().manual_seed(0)
    rows, inputs, outputs = 64, 128, 256
    weight = torch.randint(
        -largest_weight,
        largest_weight + 1,
        (outputs, inputs),
        generator=generator,
        dtype=torch.int8,
    )
    hidden = torch.randint(-127, 128, (rows, inputs), generator=generator).float()
    hidden[:, 0] = 127.0  # the scale of every row is 1
    scales = torch.ones(outputs, 1)  # oneDNN keeps no copy: it must outlive the product
    product = ops.create_onednn_scaled_mm(weight.t(), scales, torch.float32, True, False, 32)
    rounded, scale, _ = ops.onednn_scaled_int8_quant(hidden, None, None, True)
    found = torch.empty(rows, outputs)
    ops.onednn_scaled_mm(product, rounded, found, scale, None, None, None)
    exact = hidden.double() @ weight.double().t()
    return float((found - exact).pow(2).mean().sqrt() / exact.std())


def cpu_runs_int4() -> bool:
    """Whether vLLM's build for this CPU has the product with int4 weights (AVX-512 builds do)."""
    import torch

    import_module("vllm._custom_ops")  # loads the build
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def int8_warning(model: Any) -> str | None:
    """What to tell a user whose model multiplies int8 numbers on a CPU that cannot; else None.

    Args:
        model: the worker's, a `torch.nn.Module`.
    """
    kernels = (getattr(getattr(m, "scheme", None), "kernel", None) for m in model.modules())
    if not any(type(kernel).__name__ == "CPUInt8ScaledMMLinearKernel" for kernel in kernels):
        return None
    error = cpu_int8_error()
    if error == 0:
        return None
    return (
        f"vLLM's int8 product is off by {error:.0%} on this CPU, which has no VNNI instructions: "
        "weights beyond ±64 overflow. Generations and scores of this model are those of another "
        "one; use a machine with VNNI (or AMX), or another format."
    )
