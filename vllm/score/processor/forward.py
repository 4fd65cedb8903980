"""Forward passes of which only a bounded number of logits exists at a time.

A row of logits is hundreds of times a hidden state. So the decoder runs once over whole sequences,
and the head on a few hidden states at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vllm.score.errors import ScoreModeError
from vllm.score.processor.head import head_of, model_logits
from vllm.score.processor.overrides import checked_mapping
from vllm.score.processor.precision import forward_precision_ctx
from vllm.score.processor.row_batches import RowBatch

LOGITS_BYTES = 64 << 20  # a part of this size keeps any processor busy

Result = TypeVar("Result")


def fc_logits_noautocast(
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
    positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
    with forward_precision_ctx(False, torch.float32, input_ids.device.type):
        return call_with(
            target, mapping, lambda: model_logits(target, input_ids, attention_mask, positions)
        )


def call_with(
    target: nn.Module, mapping: Mapping[str, Tensor], work: Callable[[], Result]
) -> Result:
    """`work()` while the parameters of `target` are those of `mapping`."""
    named = {f"target.{k}": v for k, v in checked_mapping(target, mapping).items()}
    result: Result = torch.func.functional_call(_Around(target), named, (work,))
    return result


def map_logits(
    target: nn.Module,
    batch: RowBatch,
    compute: Callable[[Tensor, Tensor], Result],
    *,
    context: Callable[[], AbstractContextManager[Any]],
    logits_bytes: int = LOGITS_BYTES,
    itemsize: int = 4,
    checkpointed: bool = False,
) -> list[Result]:
    """`compute(logits, tokens)` on successive rows of a batch.

    Args:
        target: a causal language model.
        batch: the sequences, and which rows are wanted.
        compute: takes logits [n, V] in the model's dtype, and the tokens [n] that they score.
        context: the precision of the model's forward pass; `compute` runs outside of it.
        logits_bytes: most bytes of logits at a time, in entries of `itemsize`; at least one row.
        checkpointed: with gradients, compute logits again in the backward pass instead of keeping
            them.

    Returns:
        Results in the order of the batch's rows.
    """
    with context():
        found = head_of(target)
        if found is not None:
            head, columns = found
            hidden = head.hidden_rows(batch)
    if found is None:
        return _map_whole_sequences(target, batch, compute, context)

    def score(hidden: Tensor, tokens: Tensor) -> Result:
        with context():
            logits = head.logits(hidden)
        return compute(logits, tokens)

    count = max(1, logits_bytes // (columns * itemsize))
    parts = zip(hidden.split(count), batch.tokens.to(hidden.device).split(count), strict=True)
    if checkpointed:
        return [checkpoint(score, *part, use_reentrant=False) for part in parts]
    return [score(*part) for part in parts]


class _Around(nn.Module):
    """A module to give to `functional_call`, for more than one call of `target`."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, work: Callable[[], Result]) -> Result:
        return work()


def _map_whole_sequences(
    target: nn.Module,
    batch: RowBatch,
    compute: Callable[[Tensor, Tensor], Result],
    context: Callable[[], AbstractContextManager[Any]],
) -> list[Result]:
    results = []
    for i, tokens in enumerate(batch.tokens.split(batch.lengths)):
        begin, end = batch.starts[i], batch.starts[i] + batch.lengths[i]
        part = (slice(i, i + 1), slice(end))
        with context():
            logits = model_logits(
                target, batch.input_ids[part], batch.attention_mask[part], batch.position_ids[part]
            )
        if logits.shape[1] != end:
            raise ScoreModeError(
                f"the model gives logits of {logits.shape[1]} positions for {end} tokens: models "
                "that insert tokens, as prompt tuning does, cannot be scored here."
            )
        results.append(compute(logits[0, begin:], tokens.to(logits.device)))
    return results
