"""The head of the model that vLLM runs, taken where the model itself uses it.

`compute_logits` of nearly every model ends in `LogitsProcessor(lm_head, hidden)`. While the head
is asked for, that call hands its arguments over and returns a tensor that nothing may touch. A
model that returns this very tensor has a head and nothing after it: the scores can then be computed
on this rank's weights. Any other (one that masks ids, say) is asked for its logits instead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm.score.engine.adapters import adapter_delta
from vllm.score.ops.head import Head

logger = logging.getLogger(__name__)


class _Touched(Exception):
    """The model does something with its logits."""


class _Untouchable(torch.Tensor):
    """Stands for logits that are never computed; every operation on it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Touched(getattr(func, "__name__", str(func)))


@dataclass
class Captured:
    """What `LogitsProcessor.forward` was called with."""

    processor: Any
    lm_head: Any
    hidden: torch.Tensor
    bias: torch.Tensor | None


_open = threading.local()


def capturing() -> bool:
    """Whether this thread is asking a model for its head."""
    return getattr(_open, "calls", None) is not None


def captured_call(
    processor: Any, lm_head: Any, hidden: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Take the arguments of `LogitsProcessor.forward` while `capturing`."""
    if processor.logits_as_input:
        raise _Touched("logits_as_input")
    _open.calls.append(Captured(processor, lm_head, hidden, bias))
    standing_in: torch.Tensor = torch.Tensor._make_subclass(_Untouchable, torch.empty(0))
    _open.returned = standing_in
    return standing_in


@contextmanager
def _capturing() -> Iterator[list[Captured]]:
    calls: list[Captured] = []
    _open.calls = calls
    try:
        yield calls
    finally:
        _open.calls = _open.returned = None


def head_of(
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    index: np.ndarray,
    vocab_size: int,
) -> tuple[Head, torch.Tensor]:
    """The head and the hidden states [c, H'] that it takes, for hidden states [c, H].

    Args:
        compute_logits: the model's.
        index: [c], their places in the step.
        vocab_size: V; a head that serves another number of ids has `num_ids` of that number.
    """
    call = _capture(compute_logits, hidden)
    if call is None:
        return _whole_head(compute_logits, vocab_size), hidden
    head = _shard(call, index, vocab_size)
    if head is None:
        return _whole_head(compute_logits, vocab_size), hidden
    return head, call.hidden


def _capture(
    compute_logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor
) -> Captured | None:
    with _capturing() as calls:
        try:
            result = compute_logits(hidden)
            plain = len(calls) == 1 and result is _open.returned
        except _Touched:
            plain = False
    return calls[0] if plain else None


def _whole_head(compute_logits: Callable[[torch.Tensor], torch.Tensor], vocab_size: int) -> Head:
    """The model's own logits, gathered from all ranks; each rank reduces all of them."""

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(rows)
        if logits.shape[-1] == vocab_size:
            return logits
        # An exception here would take the engine and everybody's requests down; NaN fails just
        # these requests, with an error, at the front end.
        logger.error(
            "The model's head gives %d logits a row, its configuration says %d: no scores.",
            logits.shape[-1],
            vocab_size,
        )
        return logits.new_full((len(rows), vocab_size), float("nan"))

    return Head(None, None, logits_of, 0, vocab_size)


def _shard(call: Captured, index: np.ndarray, vocab_size: int) -> Head | None:
    """This rank's part; None where the layer is not one whose layout is known."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    processor, lm_head = call.processor, call.lm_head
    # LoRA wraps both layers.
    adapted = processor if hasattr(processor, "lora_a_stacked") else None
    processor = getattr(processor, "base_layer", processor)
    lm_head = getattr(lm_head, "base_layer", lm_head)
    if type(processor) is not LogitsProcessor or not isinstance(lm_head, VocabParallelEmbedding):
        return None
    shard = lm_head.shard_indices
    if processor.org_vocab_size != vocab_size or shard.num_added_elements:
        return None
    first, last = shard.org_vocab_start_index, min(shard.org_vocab_end_index, vocab_size)
    count = max(0, last - first)

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = processor._apply_head(lm_head, rows, call.bias)
        return logits

    return Head(
        weight=_plain_weight(lm_head, call.hidden, count),
        bias=None if call.bias is None else call.bias[:count],
        logits_of=logits_of,
        first_id=first,
        num_ids=count,
        scale=float(processor.scale),
        soft_cap=float(processor.soft_cap or 0.0),
        gather=_gather if lm_head.tp_size > 1 else None,
        delta=None if adapted is None else adapter_delta(adapted, index, first, count),
    )


def _plain_weight(lm_head: Any, hidden: torch.Tensor, count: int) -> torch.Tensor | None:
    """The shard's weights [n, H], or None where only its quantisation method knows them."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if not isinstance(lm_head.quant_method, (UnquantizedEmbeddingMethod, UnquantizedLinearMethod)):
        return None
    weight = getattr(lm_head, "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        return None
    if weight.shape[0] < count or weight.dtype != hidden.dtype:
        return None
    plain: torch.Tensor = weight.detach()[:count]
    return plain


def _gather(values: torch.Tensor) -> torch.Tensor:
    """[c, ...] of every rank as [P, c, ...]."""
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
    )

    gathered = tensor_model_parallel_all_gather(values.contiguous(), 0)
    return gathered.view(get_tensor_model_parallel_world_size(), *values.shape)
