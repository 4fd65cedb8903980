"""Calls of a model with other tensors in place of its own parameters, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vllm.score.checks import Number, check, did_you_mean
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import dtype_name, read_dtype
from vllm.score.processor.head import autocast_to, model_logits

Result = TypeVar("Result")


def build_state_override(
    target: nn.Module,
    v_named: Mapping[str, Tensor] | None,
    eta: float,
    *,
    param_dtype: torch.dtype | str | None,
    include_buffers: bool,
    buffer_dtype: torch.dtype | str | None = None,
) -> dict[str, Tensor]:
    """The parameters θ + eta·v of a model, detached.

    Args:
        target: the model.
        v_named: directions by the names of `target.named_parameters()` (a leading "module." of a
            wrapper may stay); parameters that it leaves out are not moved.
        eta: length of the step.
        param_dtype: of all parameters; None keeps each one's own, as integers always do.
        include_buffers: with the buffers, which are never moved.
        buffer_dtype: as `param_dtype`.

    Returns:
        name -> tensor. What is neither moved nor cast shares the model's memory, and so follows its
        updates; the others are copies.

    Raises:
        ScoreModeError: a name that is unknown, given twice or tied to another, a wrong shape, or a
            value that is not finite.
    """
    eta = check("eta", eta, Number)
    dtype = None if param_dtype is None else read_dtype("param_dtype", param_dtype)
    of_buffers = None if buffer_dtype is None else read_dtype("buffer_dtype", buffer_dtype)
    parameters = dict(target.named_parameters())
    directions = _checked_names(target, v_named or {}, parameters, "v_named")
    for name, direction in directions.items():
        if not parameters[name].is_floating_point():
            raise ScoreModeError(
                f"v_named[{name!r}] moves a parameter of dtype "
                f"{dtype_name(parameters[name].dtype)}: leave it out."
            )
        if not bool(torch.isfinite(direction).all()):
            raise ScoreModeError(f"v_named[{name!r}] has entries that are NaN or infinite.")
    mapping = {
        name: _moved(parameter.detach(), directions.get(name), eta, dtype)
        for name, parameter in parameters.items()
    }
    if include_buffers:
        for name, buffer in target.named_buffers():
            mapping[name] = _moved(buffer.detach(), None, 0.0, of_buffers)
    return mapping


def checked_mapping(target: nn.Module, mapping: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A mapping that a model is to be called with, under the model's own names.

    Raises:
        ScoreModeError: a name that is neither a parameter nor a buffer, given twice or tied to
            another, or a wrong shape. `torch.func.functional_call` would pass over some of these.
    """
    own = dict(target.named_parameters()) | dict(target.named_buffers())
    return _checked_names(target, mapping, own, "params_override")


def call_with(
    target: nn.Module, mapping: Mapping[str, Tensor], work: Callable[[], Result]
) -> Result:
    """`work()` while the parameters of `target` are those of a checked mapping."""
    named = {f"target.{name}": value for name, value in mapping.items()}
    result: Result = torch.func.functional_call(_Around(target), named, (work,))
    return result


def forward_logits(
    target: nn.Module, input_ids: Tensor, attention_mask: Tensor, mapping: Mapping[str, Tensor]
) -> Tensor:
    """Logits [B, L, V] of one forward pass under given parameters, autocast off, without a cache.

    Args:
        target: a causal language model.
        input_ids: int64 [B, L].
        attention_mask: [B, L]; padding on either side, positions count from the first token.
        mapping: parameters and buffers by name; those that it leaves out are the model's.

    Raises:
        ScoreModeError: a name or a shape does not fit the model.
    """
    mapping = checked_mapping(target, mapping)
    with autocast_to(None, input_ids.device):
        return call_with(target, mapping, lambda: model_logits(target, input_ids, attention_mask))


class ZeroMapping:
    """The parameters of a model as they are, in a dtype: an override at eta = 0.

    The copies keep their memory and are written anew at every `get`, which costs far less than a
    forward pass: not every change of a parameter (one through `.data`) leaves a trace that could
    tell that a copy is stale.

    Args:
        target: the model.
    """

    def __init__(self, target: nn.Module) -> None:
        self._target = target
        self._copies: dict[str, Tensor] = {}

    def get(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Name -> tensor, valid until the next call; parameters of that dtype are not copied."""
        own = {name: each.detach() for name, each in self._target.named_parameters()}
        copies = {}
        for name, parameter in own.items():
            if parameter.is_floating_point() and parameter.dtype != dtype:
                kept = self._copies.get(name)
                wanted = (parameter.shape, dtype, parameter.device)
                if kept is None or (kept.shape, kept.dtype, kept.device) != wanted:
                    kept = torch.empty_like(parameter, dtype=dtype)
                copies[name] = kept.copy_(parameter)
        self._copies = copies
        return own | copies


def _moved(base: Tensor, direction: Tensor | None, eta: float, dtype: torch.dtype | None) -> Tensor:
    if not base.is_floating_point():
        return base
    dtype = dtype or base.dtype
    if direction is None or eta == 0.0:
        return base.to(dtype)
    # In half precision the product would be rounded, and then the sum again.
    exact = torch.promote_types(dtype, torch.float32)
    step = direction.detach().to(device=base.device, dtype=exact)
    return torch.add(base.to(exact), step, alpha=eta).to(dtype)


def _checked_names(
    target: nn.Module, given: Any, own: Mapping[str, Tensor], what: str
) -> dict[str, Tensor]:
    first_names = {id(tensor): name for name, tensor in own.items()}
    every = dict(target.named_parameters(remove_duplicate=False))
    every |= dict(target.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for given_name, value in check(what, given, dict[str, Any]).items():
        name = given_name if given_name in every else given_name.removeprefix("module.")
        if name not in own:
            tied = first_names.get(id(every.get(name)))
            why = "which the model's named_parameters() do not have" + did_you_mean(name, own)
            if tied is not None:
                why = f"which is tied to {tied!r}: name that one alone"
            raise ScoreModeError(f"{what} names {given_name!r}, {why}.")
        if name in found:
            raise ScoreModeError(f"{what} names {name!r} twice, with and without 'module.'.")
        if not isinstance(value, Tensor) or value.shape != own[name].shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ScoreModeError(
                f"{what}[{given_name!r}] must be a tensor of the shape {tuple(own[name].shape)}, "
                f"got {got}."
            )
        found[name] = value
    return found


class _Around(nn.Module):
    """A module to give to `functional_call`, for more than one call of `target`."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()
