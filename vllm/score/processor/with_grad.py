"""Teacher forcing that keeps the graph of the live parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vllm.score.processor.batches import Response
from vllm.score.processor.forward import LOGITS_BYTES, map_logits
from vllm.score.processor.head import causal_model
from vllm.score.processor.policy import SamplingPolicy, step_values
from vllm.score.processor.precision import forward_precision_ctx, scoring_dtype
from vllm.score.processor.row_batches import (
    RowBatch,
    check_ids,
    row_batches,
    values_by_response,
)
from vllm.score.processor.settings import read_profile
from vllm.score.processor.steps import StepValues


def score_with_grad(
    module: nn.Module,
    responses: Sequence[Response],
    policy: SamplingPolicy,
    *,
    batch_size: int,
    profile: Mapping[str, Any],
    eos_token_ids: Sequence[int] = (),
    entropy: bool = True,
    features: bool = False,
    logits_bytes: int = LOGITS_BYTES,
) -> list[StepValues[Tensor]]:
    """The values of every response's steps, with gradients in the parameters of `module`.

    The module runs as it is, in its own mode (dropout acts in training). Logits are computed again
    in the backward pass, a part at a time; the decoder's activations are kept, so memory grows with
    the number of responses.

    Args:
        module: a causal language model, not wrapped in DistributedDataParallel.
        responses: B * G sequences.
        policy: what the tokens were sampled by.
        batch_size: sequences in a forward pass.
        profile: "tf_withgrad", see `settings.Precision`.
        eos_token_ids: of `StepValues.eos_prob`.
        entropy: compute `rb_entropy`, with its graph.
        features: compute all values; those but `logprob`, `logq` and `rb_entropy` are detached.
        logits_bytes: most bytes of float32 logits at a time, at least one row.

    Returns:
        Tensors [T] on the model's device, in the order of `responses`. float32, or float64 if the
        model is.

    Raises:
        ScoreModeError: ids that do not fit the model, a wrong profile, or logits with NaN.
    """
    checked = read_profile("tf_withgrad", profile)
    check_ids(causal_model(module), responses)
    first = next(module.parameters())

    def precision() -> AbstractContextManager[Any]:
        return forward_precision_ctx(checked.autocast, checked.dtype, first.device.type)

    def compute(logits: Tensor, tokens: Tensor) -> StepValues[Tensor]:
        with forward_precision_ctx(False, torch.float32, first.device.type):
            values = step_values(
                logits.to(scoring_dtype(logits.dtype, checked.cast)),
                tokens,
                policy,
                eos_token_ids=eos_token_ids,
                diagnostics=features,
                entropy=entropy,
            )
        kept = values.rb_entropy if entropy else None
        detached = values.map(Tensor.detach)
        return replace(
            detached,
            logprob=values.logprob,
            logq=values.logq,
            rb_entropy=detached.rb_entropy if kept is None else kept,
        )

    def score(batch: RowBatch) -> list[StepValues[Tensor]]:
        return map_logits(
            module,
            batch,
            compute,
            context=precision,
            logits_bytes=logits_bytes,
            itemsize=8 if first.dtype == torch.float64 else 4,
            checkpointed=torch.is_grad_enabled(),
        )

    def empty() -> StepValues[Tensor]:
        columns = max(eos_token_ids, default=0) + 1
        logits = torch.zeros(0, columns, dtype=first.dtype, device=first.device)
        return compute(logits, torch.zeros(0, dtype=torch.int64, device=first.device))

    batches = row_batches(responses, batch_size, first.device)
    return values_by_response(responses, batches, score, empty)
