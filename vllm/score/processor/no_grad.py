"""Teacher forcing without gradients, under given parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vllm.score.processor.batches import Response
from vllm.score.processor.forward import LOGITS_BYTES, call_with, map_logits
from vllm.score.processor.head import causal_model, evaluating
from vllm.score.processor.policy import SamplingPolicy, step_values
from vllm.score.processor.precision import forward_precision_ctx, scoring_dtype
from vllm.score.processor.row_batches import (
    RowBatch,
    check_ids,
    row_batches,
    values_by_response,
)
from vllm.score.processor.steps import StepValues


@torch.no_grad()
def score_no_grad(
    target: nn.Module,
    mapping: Mapping[str, Tensor],
    responses: Sequence[Response],
    policy: SamplingPolicy,
    *,
    batch_size: int,
    entropy_fp64: bool = False,
    cast_logits_fp32: bool = True,
    eos_token_ids: Sequence[int] = (),
    diagnostics: bool = True,
    entropy: bool = True,
    logits_bytes: int = LOGITS_BYTES,
) -> list[StepValues[np.ndarray]]:
    """The values of every response's steps.

    The model runs by `torch.func.functional_call`, with autocast and dropout off.

    Args:
        target: a causal language model, not wrapped in DistributedDataParallel.
        mapping: parameters and buffers by name; those that it leaves out are the model's.
        responses: B * G sequences.
        policy: what the tokens were sampled by.
        batch_size: sequences in a forward pass.
        entropy_fp64: compute on the logits in float64.
        cast_logits_fp32: compute in float32 on logits of half precision, which are refused
            otherwise.
        eos_token_ids: of `StepValues.eos_prob`.
        diagnostics: compute all values; otherwise the log-probabilities and, with `entropy`, the
            entropy.
        logits_bytes: most bytes of logits at a time in the dtype computed in, at least one row.

    Returns:
        Arrays [T] in the order of `responses`, float32 or float64.

    Raises:
        ScoreModeError: ids or parameters that do not fit the model, or logits with NaN.
    """
    check_ids(causal_model(target), responses)
    device = next(target.parameters()).device
    dtype = next((t.dtype for t in mapping.values() if t.is_floating_point()), torch.float32)

    def compute(logits: Tensor, tokens: Tensor) -> StepValues[Tensor]:
        return step_values(
            logits.to(scoring_dtype(logits.dtype, cast_logits_fp32, entropy_fp64)),
            tokens,
            policy,
            eos_token_ids=eos_token_ids,
            diagnostics=diagnostics,
            entropy=entropy,
        )

    def score(batch: RowBatch) -> list[StepValues[Tensor]]:
        pieces = map_logits(
            target,
            batch,
            compute,
            context=lambda: forward_precision_ctx(False, torch.float32, device.type),
            logits_bytes=logits_bytes,
            itemsize=8 if entropy_fp64 or dtype == torch.float64 else 4,
        )
        return [piece.map(Tensor.cpu) for piece in pieces]

    def empty() -> StepValues[Tensor]:
        logits = torch.zeros(0, max(eos_token_ids, default=0) + 1, dtype=dtype)
        return compute(logits, torch.zeros(0, dtype=torch.int64))

    with evaluating(target):
        values = call_with(
            target,
            mapping,
            lambda: values_by_response(
                responses, row_batches(responses, batch_size, device), score, empty
            ),
        )
    return [value.map(Tensor.numpy) for value in values]
