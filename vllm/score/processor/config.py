"""The configuration of a `SequenceProcessor`: how to generate, and how precisely to compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_type_hints

import torch
from pydantic import Field

from vllm.score.checks import Count, Flag, Fraction, Number, check, check_name, settings
from vllm.score.errors import ScoreModeError

HALVES = (torch.bfloat16, torch.float16)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, *HALVES)
}
# What each profile starts from; the last key is its switch for casts.
_PROFILES: dict[str, dict[str, Any]] = {
    "func_override": {"autocast": False, "dtype": "float32", "cast_params": True},
    "tf_nograd": {"autocast": False, "dtype": "float32", "cast_logits_fp32": True},
    "tf_withgrad": {"autocast": False, "dtype": "float32", "cast_logits_fp32": True},
}
_REMEDIES = {
    "temperature": "set do_sample=False for greedy generation",
    "top_p": "1 samples from the whole vocabulary",
}


@dataclass
class GenerationConfig:
    """How responses are sampled, and in which batches.

    The sampling policy q is softmax(logits / temperature), restricted to its nucleus (top-p) and
    renormalised. A field is checked whenever it is set.

    Attributes:
        temperature: divides the logits, above 0.
        top_p: only the most likely tokens whose probabilities first add up to it are sampled; in
            (0, 1], 1 for all.
        max_new_tokens: longest response, in tokens.
        do_sample: False takes the most likely token each time.
        num_return_sequences: responses per prompt, G, where a call does not say.
        gen_batch_size: sequences generated at once by Hugging Face.
        tf_batch_size: sequences scored at once by Hugging Face.
        rb_requires_grad: with gradients, return entropies that carry a graph too.

    Raises:
        ScoreModeError: names the field, the value and what is allowed.
    """

    temperature: Annotated[Number, Field(gt=0)] = 1.0
    top_p: Fraction = 1.0
    max_new_tokens: Count = 200
    do_sample: Flag = True
    num_return_sequences: Count = 8
    gen_batch_size: Count = 32
    tf_batch_size: Count = 8
    rb_requires_grad: Flag = False

    def __setattr__(self, name: str, value: Any) -> None:
        kinds = _kinds(GenerationConfig)
        check_name("field of GenerationConfig", name, kinds)
        object.__setattr__(self, name, check(name, value, kinds[name], _REMEDIES.get(name, "")))


@dataclass(frozen=True)
class Profile:
    """A checked profile.

    Attributes:
        autocast: the dtype to autocast to, None for no autocast.
        dtype: of parameters.
        cast: `cast_params` or `cast_logits_fp32`.
    """

    autocast: torch.dtype | None
    dtype: torch.dtype
    cast: bool


@settings
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
        matmul_precision: where TF32 is allowed.
        entropy_fp64: without gradients, softmax, log-probabilities and entropies in float64.
    """

    func_override: dict[str, Any] = Field(default_factory=dict)
    tf_nograd: dict[str, Any] = Field(default_factory=dict)
    tf_withgrad: dict[str, Any] = Field(default_factory=dict)
    allow_tf32: Flag = False
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    entropy_fp64: Flag = False

    def __post_init__(self) -> None:
        for name, defaults in _PROFILES.items():
            values = getattr(self, name)
            read_profile(name, values)
            values.update(defaults | values)

    def apply_to_process(self) -> None:
        """Set how this process multiplies float32 matrices.

        "high" and "medium" stand for TF32 and bfloat16 products, so they take effect only where
        `allow_tf32` permits those; without it every product is a float32 one ("highest").
        """
        chosen = self.matmul_precision if self.allow_tf32 else "highest"
        torch.set_float32_matmul_precision(chosen)
        torch.backends.cudnn.allow_tf32 = self.allow_tf32


def read_config(
    config: GenerationConfig | Mapping[str, Any] | None,
) -> tuple[GenerationConfig, Precision]:
    """From what a `SequenceProcessor` is given: a `GenerationConfig` as it is, or a dict.

    The dict has up to two sections: "generation", the fields of `GenerationConfig`, and
    "precision", those of `Precision`. What it leaves out has its default.

    Raises:
        ScoreModeError: names the section, the field and what is allowed.
    """
    if isinstance(config, GenerationConfig):
        return config, Precision()
    sections = _section("config", {} if config is None else config, ("generation", "precision"))
    fields = {
        name: _section(f"config[{name!r}]", sections.get(name, {}), _kinds(cls))
        for name, cls in (("generation", GenerationConfig), ("precision", Precision))
    }
    return GenerationConfig(**fields["generation"]), Precision(**fields["precision"])


def read_profile(name: str, values: Mapping[str, Any]) -> Profile:
    """Check a profile; keys that it lacks have their defaults.

    Raises:
        ScoreModeError: names the key, the value and what is allowed.
    """
    given = {**_PROFILES[name], **_section(name, values, _PROFILES[name])}
    switch = list(_PROFILES[name])[-1]
    autocast, cast = (check(f"{name}[{k!r}]", given[k], Flag) for k in ("autocast", switch))
    dtype = read_dtype(f"{name}['dtype']", given["dtype"])
    if autocast and (name != "tf_withgrad" or dtype not in HALVES):
        raise ScoreModeError(
            f"{name} has autocast to {dtype_name(dtype)}: set 'autocast' to False. With gradients "
            "(tf_withgrad) it is to bfloat16 or float16, without them the model always runs with "
            "autocast off, in the parameters' 'dtype'."
        )
    return Profile(dtype if autocast else None, dtype, cast)


def read_dtype(field: str, value: Any) -> torch.dtype:
    """The floating-point dtype named by a string, or the dtype itself.

    Raises:
        ScoreModeError: names `field`.
    """
    name = dtype_name(value)
    check_name(field, name, _DTYPES)
    return _DTYPES[name]


def dtype_name(dtype: Any) -> str:
    """For example "float32"."""
    return str(dtype).removeprefix("torch.")


@cache
def _kinds(cls: type) -> dict[str, Any]:
    """The annotations of a class's fields."""
    return get_type_hints(cls, include_extras=True)


def _section(where: str, values: Any, known: Iterable[str]) -> dict[str, Any]:
    fields: dict[str, Any] = check(where, values, dict[str, Any], f"fields: {', '.join(known)}")
    for name in fields:
        check_name(f"{where}: field", name, known)
    return fields
