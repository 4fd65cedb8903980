"""Quantised copies of small models, in the compressed-tensors format that vLLM serves.

For tests and benchmarks: weights are rounded to nearest, with scales from each block's extremes
and no calibration. Real models are better quantised by llm-compressor, which writes this format.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationScheme


@dataclass(frozen=True)
class Scheme:
    """A preset of compressed-tensors with changes.

    Attributes:
        preset: its name there.
        weights: fields of the weights' arguments that differ.
        spread: how many times larger the scales are than the weights need.
    """

    preset: str
    weights: Mapping[str, Any] = field(default_factory=dict)
    spread: float = 1.0


SCHEMES = {
    # int8 channels; the inputs are rounded to int8, each token with a scale of its own.
    "W8A8": Scheme("W8A8"),
    # The same with numbers from -64 to 64: exact on CPUs whose int8 product saturates, too.
    "W8A8_7BIT": Scheme("W8A8", spread=2.0),
    "W4A16": Scheme("W4A16"),  # int4 in groups of 128
    "W4A16_G32": Scheme("W4A16", {"group_size": 32}),
    # e4m3 channels, or one scale a tensor; inputs rounded to e4m3 with a scale a token.
    "FP8": Scheme("FP8_DYNAMIC"),
    "FP8_TENSOR": Scheme("FP8_DYNAMIC", {"strategy": "tensor"}),
    "NVFP4A16": Scheme("NVFP4A16"),  # e2m1 in groups of 16 with e4m3 scales
}
HEAD = "lm_head"
# vLLM runs these as one product, with one scale where there is one scale a tensor. Given two, it
# rounds the weights again (FP8) or takes one for both (NVFP4).
_FUSED = (re.compile(r"(.*)\.[qkv]_proj"), re.compile(r"(.*)\.(?:gate|up)_proj"))


def quantise_model(
    source: str | Path, destination: str | Path, scheme: str, *, quantise_head: bool = False
) -> Path:
    """Write a quantised copy of a Hugging Face model folder.

    Args:
        source: a folder with `config.json` and safetensors files of float weights.
        destination: folder to write to; made where it does not exist.
        scheme: one of `SCHEMES`. All linear layers are quantised; scales are stored in the
            dtype of the weights (those of NVFP4 in float8_e4m3fn), which the engine must run in:
            vLLM converts the scales of int4 weights to its own dtype.
        quantise_head: whether the language-model head is quantised as well; most published
            checkpoints leave it alone.

    Returns:
        The folder, as a path.

    Raises:
        ScoreModeError: for an unknown scheme, a model without linear layers, a quantised head
            that is the input embedding, or a layer that the scheme's groups do not divide.
    """
    if scheme not in SCHEMES:
        raise ScoreModeError(f"scheme is {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    source, target = Path(source), Path(destination)
    tensors = load_tensors(source)
    targets = _linear_layers(source, tensors, quantise_head)
    written = quantise_tensors(
        tensors, targets, _arguments(scheme, quantise_head), spread=SCHEMES[scheme].spread
    )
    target.mkdir(parents=True, exist_ok=True)
    copy_rest(source, target)
    save_tensors(written, target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _quantization_config(scheme, quantise_head)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target


def quantise_tensors(
    tensors: Mapping[str, torch.Tensor],
    layers: Iterable[str],
    scheme: QuantizationScheme,
    *,
    spread: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Replace `<layer>.weight` [out, in] of the layers by the scheme's compressed tensors."""
    import torch

    layers = list(layers)
    peaks = _fused_peaks(tensors, layers)
    out = {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in layers}
    # Compiling the rounding to four bits takes longer than rounding all of a small model.
    with torch.compiler.set_stance("force_eager"):
        for layer in layers:
            stored = tensors[f"{layer}.weight"]
            scales = _scales(
                stored.float() * spread, peaks[layer] * spread, scheme.weights, stored.dtype
            )
            out |= _compress(layer, stored, scales, scheme)
    return out


def _compress(
    layer: str,
    stored: torch.Tensor,
    scales: Mapping[str, torch.Tensor],
    scheme: QuantizationScheme,
) -> dict[str, torch.Tensor]:
    """The tensors that stand for a weight [out, in], by their names in the checkpoint."""
    import torch
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(_format(scheme))
    try:
        packed = compressor.compress({"weight": stored.float(), **scales}, scheme)
    except (RuntimeError, ValueError) as error:
        raise ScoreModeError(
            f"layer {layer} of shape {tuple(stored.shape)} cannot be quantised: {error}"
        ) from error
    if packed["weight_scale"].dtype == torch.float32:
        packed["weight_scale"] = packed["weight_scale"].to(stored.dtype)
    return {f"{layer}.{name}": tensor.contiguous() for name, tensor in packed.items()}


def _scales(
    weight: torch.Tensor, peak: torch.Tensor, args: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Scales in float32 that hold exactly what will be stored, from each block's extremes."""
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if args.strategy == QuantizationStrategy.TENSOR:
        low, high = -peak, peak
    elif args.strategy == QuantizationStrategy.CHANNEL:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    else:
        if weight.shape[1] % args.group_size:
            raise ScoreModeError(
                f"a layer with {weight.shape[1]} inputs has no groups of {args.group_size}; "
                "choose another scheme or model size"
            )
        low, high = weight.unflatten(1, (-1, args.group_size)).aminmax(dim=2)
    if args.strategy == QuantizationStrategy.TENSOR_GROUP:
        common = generate_gparam(-peak, peak)
        scale, _ = calculate_qparams(low, high, args, global_scale=common)
        return {"weight_scale": scale.float(), "weight_global_scale": common}
    scale, _ = calculate_qparams(low, high, args)
    return {"weight_scale": scale.to(dtype).float()}


def _fused_peaks(
    tensors: Mapping[str, torch.Tensor], layers: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Largest |weight| by layer, over all layers that vLLM fuses with it."""
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        found = [(i, m[1]) for i, p in enumerate(_FUSED) if (m := p.fullmatch(layer))]
        groups[str(found[0]) if found else layer].append(layer)
    return {
        layer: max(tensors[f"{member}.weight"].float().abs().max() for member in members)
        for members in groups.values()
        for layer in members
    }


def _arguments(name: str, quantise_head: bool) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    chosen = SCHEMES[name]
    # vLLM's head is no `Linear`: a scheme meets it by its own name.
    scheme = preset_name_to_scheme(chosen.preset, ["Linear", HEAD] if quantise_head else ["Linear"])
    fields = scheme.model_dump()
    fields["weights"] |= chosen.weights
    return QuantizationScheme.model_validate(fields)


def _format(scheme: QuantizationScheme) -> str:
    import torch
    from compressed_tensors.compressors.format import infer_module_format

    return str(infer_module_format(torch.nn.Linear, scheme).value)


def _quantization_config(name: str, quantise_head: bool) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    scheme = _arguments(name, quantise_head)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=_format(scheme),
        quantization_status="compressed",
        ignore=[] if quantise_head else [HEAD],
    )
    return {**config.model_dump(mode="json"), "quant_method": "compressed-tensors"}


def _linear_layers(
    source: Path, tensors: Mapping[str, torch.Tensor], quantise_head: bool
) -> list[str]:
    """Names of the layers to quantise, from the architecture itself."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    if quantise_head and config.tie_word_embeddings:
        raise ScoreModeError(
            "quantise_head=True, but the model's head is its input embedding; quantise a model "
            "with tie_word_embeddings=False"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    chosen = [n for n in names if f"{n}.weight" in tensors and (n != HEAD or quantise_head)]
    if not set(chosen) - {HEAD}:
        raise ScoreModeError(
            f"{source} has no linear layers to quantise (architecture {config.model_type!r}); "
            "llama and qwen3 have them"
        )
    return chosen


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files, by name."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ScoreModeError(f"{folder} has no safetensors file")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def save_tensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write them as the folder's only safetensors file."""
    from safetensors.torch import save_file

    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def copy_rest(source: Path, target: Path) -> None:
    """Copy the tokenizer and the other small files that stand beside weights and configuration."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and "safetensors" not in file.name:
            shutil.copy(file, target / file.name)
