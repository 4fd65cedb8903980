"""The values of one response's steps, which every backend computes and all results are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, TypeVar

Array = TypeVar("Array")  # torch.Tensor or numpy.ndarray


@dataclass(frozen=True)
class StepValues(Generic[Array]):
    """Arrays or tensors [T], one entry a generated token, in nats.

    The names are those of `TokenStepDiagnostics`, which defines them; None: not computed.

    Attributes:
        logprob: log p of the token under the model itself.
        logq: log q of the token under the sampling policy.
    """

    logprob: Array
    logq: Array
    rb_entropy: Array | None = None
    head_mass: Array | None = None
    top1_prob: Array | None = None
    margin: Array | None = None
    collision: Array | None = None
    logit_mean: Array | None = None
    logit_var: Array | None = None
    eos_prob: Array | None = None

    def map(self, change: Callable[[Array], Any]) -> StepValues[Any]:
        """The same with `change` applied to every value that was computed."""
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in given.items() if v is not None})
