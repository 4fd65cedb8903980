"""From the values of every response's steps to the results that a caller reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from vllm.score.processor.batches import Response
from vllm.score.processor.diagnostics import baseline_features, diagnostics_pack
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import DiagnosticsResults, LogprobResults

Made = TypeVar("Made")


def results_without_grad(
    responses: Sequence[Response], values: Sequence[StepValues[np.ndarray]], compute_rb: bool
) -> LogprobResults:
    """Detached CPU tensors and arrays, [B][G], from arrays [T]."""
    return LogprobResults(
        logprobs=_grid(responses, values, lambda v: torch.from_numpy(v.logprob)),
        entropies=_grid(responses, values, lambda v: -v.logprob),
        sequence_logprobs=_grid(responses, values, lambda v: _sum(v.logprob)),
        rb_entropies=_grid(responses, values, lambda v: _entropies(v, compute_rb)),
        rewards=_grid(responses, values, lambda v: 0.0),
        token_logqs=_grid(responses, values, lambda v: torch.from_numpy(v.logq)),
        sequence_logqs=_grid(responses, values, lambda v: _sum(v.logq)),
    )


def results_with_grad(
    responses: Sequence[Response],
    values: Sequence[StepValues[torch.Tensor]],
    *,
    compute_rb: bool,
    rb_requires_grad: bool,
    features: bool,
) -> LogprobResults:
    """Tensors [T] on the model's device, those of the log-probabilities with their graph."""
    plain = results_without_grad(responses, [v.map(to_numpy) for v in values], compute_rb)
    plain.logprobs = _grid(responses, values, lambda v: v.logprob)
    plain.token_logqs = _grid(responses, values, lambda v: v.logq)
    if compute_rb and rb_requires_grad:
        plain.rb_entropies_torch = _grid(responses, values, lambda v: v.rb_entropy)
    if features:
        plain.baseline_feats_torch = _grid(responses, values, baseline_features)
    return plain


def diagnostics_results(
    responses: Sequence[Response], values: Sequence[StepValues[np.ndarray]]
) -> DiagnosticsResults:
    """A pack a response, [B][G]."""
    return DiagnosticsResults(_grid(responses, values, diagnostics_pack))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Detached, on the CPU, float32 or float64."""
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array


def _entropies(values: StepValues[np.ndarray], wanted: bool) -> np.ndarray:
    if not wanted or values.rb_entropy is None:
        return np.empty(0, dtype=values.logprob.dtype)
    return values.rb_entropy


def _sum(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))


def _grid(
    responses: Sequence[Response],
    values: Sequence[StepValues[Any]],
    make: Callable[[StepValues[Any]], Made],
) -> list[list[Made]]:
    """[B][G] of what `make` makes of each response's values."""
    grid: list[list[Made]] = [[] for _ in range(max(r.prompt for r in responses) + 1)]
    for response, value in zip(responses, values, strict=True):
        grid[response.prompt].append(make(value))
    return grid
