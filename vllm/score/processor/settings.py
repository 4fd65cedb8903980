"""The configuration of a `SequenceProcessor`: how to generate, and how precisely to compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from vllm.score.errors import ScoreModeError
from vllm.score.processor.precision import HALVES, MATMUL_PRECISIONS, dtype_name, parse_dtype
from vllm.score.processor.types import GenerationConfig, unknown

# What each profile starts from, and the name of its switch for casts.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "func_override": {"autocast": False, "dtype": "float32", "cast_params": True},
    "tf_nograd": {"autocast": False, "dtype": "float32", "cast_logits_fp32": True},
    "tf_withgrad": {"autocast": False, "dtype": "float32", "cast_logits_fp32": True},
}


@dataclass
class Precision:
    """Dtypes of the Hugging Face path.

    The profiles are plain dicts, which may be changed at any time: `read_profile` checks them when
    they are used.

    Attributes:
        func_override: of overridden parameters: `dtype` they are cast to if `cast_params`.
        tf_nograd: of scoring without gradients: `dtype` of the parameters where none are
            overridden; `cast_logits_fp32` casts half-precision logits before the softmax.
        tf_withgrad: of scoring with gradients: `dtype` that `autocast` casts to (without autocast,
            the live module computes in its own); `cast_logits_fp32` as above.
        allow_tf32: let float32 products on a GPU use TF32.
        matmul_precision: "highest", "high" or "medium", where TF32 is allowed.
        entropy_fp64: without gradients, softmax, log-probabilities and entropies in float64.
    """

    func_override: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULTS["func_override"]))
    tf_nograd: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULTS["tf_nograd"]))
    tf_withgrad: dict[str, Any] = field(default_factory=lambda: dict(_DEFAULTS["tf_withgrad"]))
    allow_tf32: bool = False
    matmul_precision: str = "high"
    entropy_fp64: bool = False


@dataclass(frozen=True)
class Profile:
    """A checked profile.

    Attributes:
        cast: `cast_params` or `cast_logits_fp32`.
    """

    autocast: bool
    dtype: torch.dtype
    cast: bool


def read_config(
    config: GenerationConfig | Mapping[str, Any] | None,
) -> tuple[GenerationConfig, Precision]:
    """From what a `SequenceProcessor` is given: a `GenerationConfig` as it is, or a dict.

    The dict has up to two sections: "generation", the fields of `GenerationConfig`, and
    "precision", those of `Precision`. What it leaves out has its default.

    Raises:
        ScoreModeError: names the section, the field and what is allowed.
    """
    if config is None:
        return GenerationConfig(), Precision()
    if isinstance(config, GenerationConfig):
        return config, Precision()
    sections = _mapping("config", config, ["generation", "precision"])
    names = [f.name for f in fields(GenerationConfig)]
    generation = _mapping("config['generation']", sections.get("generation", {}), names)
    return GenerationConfig(**generation), _read_precision(sections.get("precision", {}))


def read_profile(section: str, values: Mapping[str, Any]) -> Profile:
    """Check a profile; keys that it lacks have their defaults.

    Raises:
        ScoreModeError: names the key, the value and what is allowed.
    """
    defaults = _DEFAULTS[section]
    given = {**defaults, **_mapping(section, values, list(defaults))}
    switch = list(defaults)[-1]
    for key in ("autocast", switch):
        _check_bool(f"{section}[{key!r}]", given[key])
    dtype = parse_dtype(f"{section}['dtype']", given["dtype"])
    if given["autocast"] and section != "tf_withgrad":
        raise ScoreModeError(
            f"{section}['autocast'] is True: without gradients the model always runs with autocast "
            "off; set it to False, and 'dtype' to that of the parameters."
        )
    if given["autocast"] and dtype not in HALVES:
        raise ScoreModeError(
            f"{section} has autocast to {dtype_name(dtype)}, which does not exist: set 'dtype' to "
            "bfloat16 or float16, or 'autocast' to False."
        )
    return Profile(given["autocast"], dtype, given[switch])


def _read_precision(values: Any) -> Precision:
    section = _mapping("config['precision']", values, [f.name for f in fields(Precision)])
    found = Precision()
    for name, value in section.items():
        if name in _DEFAULTS:
            read_profile(name, value)
            getattr(found, name).update(value)
        elif name == "matmul_precision":
            if value not in MATMUL_PRECISIONS:
                raise ScoreModeError(
                    f"matmul_precision must be one of {', '.join(MATMUL_PRECISIONS)}, got "
                    f"{value!r}."
                )
            found.matmul_precision = value
        else:
            _check_bool(name, value)
            setattr(found, name, value)
    return found


def _mapping(where: str, values: Any, allowed: list[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ScoreModeError(
            f"{where} must be a dict with some of {', '.join(allowed)}, got {values!r}."
        )
    for name in values:
        if name not in allowed:
            raise ScoreModeError(f"{where} has no field {unknown(name, allowed)}")
    return dict(values)


def _check_bool(where: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ScoreModeError(f"{where} must be True or False, got {value!r}.")
