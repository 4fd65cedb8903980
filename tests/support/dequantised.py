"""The model that a quantised checkpoint stands for: its stored numbers times its stored scales.

A reference for scores computed on the quantised weights themselves. It reads the files with its
own arithmetic, so it can disagree with the library that wrote them and with the engine's kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.quantised import HEAD, copy_rest, load_tensors, save_tensors
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import torch

_INT8_MAX, _E4M3_MAX = 127.0, 448.0


def dequantise_model(source: str | Path, destination: str | Path) -> Path:
    """Write the plain float32 Hugging Face model of a quantised folder.

    Args:
        source: a folder in the compressed-tensors format, symmetric, with int8, float8_e4m3fn,
            packed int4 or packed e2m1 weights.
        destination: folder to write to; made where it does not exist.

    Returns:
        The folder, as a path.

    Raises:
        ScoreModeError: the folder holds a weight in another format.
    """
    source, target = Path(source), Path(destination)
    written = dequantise_tensors(load_tensors(source))
    target.mkdir(parents=True, exist_ok=True)
    copy_rest(source, target)
    save_tensors(written, target)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def dequantise_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight as stored number × stored scale, float32; other tensors in float32."""
    out = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and f"{layer}.weight_scale" in tensors:
            numbers = tensor.double()
        elif kind == "weight_packed":
            numbers = _unpack(tensor, name)
        elif kind in ("weight_scale", "weight_global_scale", "weight_shape"):
            continue
        elif tensor.is_floating_point():
            out[name] = tensor.float()
            continue
        else:
            raise ScoreModeError(f"{name} of dtype {tensor.dtype} is in no format known here")
        scale = tensors[f"{layer}.weight_scale"].double()
        if f"{layer}.weight_global_scale" in tensors:
            scale = scale / tensors[f"{layer}.weight_global_scale"].double()
        if scale.ndim == 2:  # one scale for each run of consecutive inputs
            scale = scale.repeat_interleave(numbers.shape[1] // scale.shape[1], dim=1)
        out[f"{layer}.weight"] = (numbers * scale).float()
    return out


def _unpack(packed: torch.Tensor, name: str) -> torch.Tensor:
    """Half-byte numbers of consecutive inputs, lowest bits first, as float64 [out, in]."""
    import torch

    if packed.dtype not in (torch.int32, torch.uint8):
        raise ScoreModeError(f"{name} of dtype {packed.dtype} is in no format known here")
    shifts = torch.arange(0, 8 * packed.element_size(), 4)
    codes = ((packed.long()[:, :, None] >> shifts) & 15).flatten(1)
    if packed.dtype == torch.int32:
        return codes.double() - 8
    # e2m1: sign, two bits of exponent with bias 1, one bit of mantissa.
    sign, exponent, mantissa = codes >> 3, (codes >> 1) & 3, (codes & 1).double()
    size = torch.where(exponent == 0, mantissa / 2, 2.0 ** (exponent - 1) * (1 + mantissa / 2))
    return torch.where(sign == 1, -size, size)


def activation_format(folder: str | Path) -> str | None:
    """What the inputs of quantised layers are rounded to: "int", "float" (e4m3), or None."""
    config = json.loads((Path(folder) / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    args = group["input_activations"]
    if args is None:
        return None
    if args["num_bits"] != 8 or args["strategy"] != "token" or not args["symmetric"]:
        raise ScoreModeError(f"input_activations {args} are in no format known here")
    return str(args["type"])


def round_tokens(x: torch.Tensor, to: str) -> torch.Tensor:
    """Each token's vector rounded to 8 bits with a scale of its own, in the dtype of `x`.

    Args:
        x: [..., H].
        to: "int": 255 equal steps between ∓ the largest entry; "float": e4m3 with the largest
            entry at its largest number.
    """
    import torch

    wide = x.float() if x.itemsize < 4 else x  # 16 bits would round a second time
    peak = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if to == "int":
        scale = peak / _INT8_MAX
        rounded = (wide / scale).round()
    else:
        scale = peak / _E4M3_MAX
        clamped = (wide / scale).clamp(-_E4M3_MAX, _E4M3_MAX)
        rounded = clamped.float().to(torch.float8_e4m3fn).to(wide.dtype)
    return (rounded * scale).to(x.dtype)


@contextmanager
def rounded_inputs(model: Any, to: str | None, *, head: bool = False) -> Iterator[None]:
    """While open, every linear layer of a Hugging Face model gets rounded inputs.

    Args:
        to: as `round_tokens`; None changes nothing.
        head: whether the language-model head's input is rounded as well.
    """
    import torch

    handles = [
        module.register_forward_pre_hook(lambda _, inputs: (round_tokens(inputs[0], str(to)),))
        for name, module in model.named_modules()
        if to is not None and isinstance(module, torch.nn.Linear) and (name != HEAD or head)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
