"""The head of the model that vLLM runs, taken where the model itself uses it.

`compute_logits` of nearly every model ends in `LogitsProcessor(lm_head, hidden)`. While the head
is asked for, that call hands its arguments over and returns a tensor that nothing may touch. A
model that returns this very tensor has a head and nothing after it: the scores can then be computed
on this rank's weights. Any other (one that masks ids, say) is asked for its logits instead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from vllm.score.ops.reference import product
from vllm.score.ops.score_rows import Head

logger = logging.getLogger(__name__)

# Of hidden states [c, H], [c, any number of ids].
ComputeLogits = Callable[[torch.Tensor], torch.Tensor]

# On upstream's LogitsProcessorWithLoRA: the slots whose adapter has weights for the head.
SLOTS = "score_mode_slots"


class _Touched(Exception):
    """The model does something with its logits."""


class _Untouchable(torch.Tensor):
    """Stands for logits that are never computed; every operation on it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Touched(getattr(func, "__name__", str(func)))


@dataclass
class Captured:
    """What `LogitsProcessor.forward` was called with, and the tensor that it returned."""

    processor: Any
    lm_head: Any
    hidden: torch.Tensor
    bias: torch.Tensor | None
    returned: torch.Tensor


_open = threading.local()  # `calls`: while this thread asks a model for its head


def capturing() -> bool:
    """Whether this thread is asking a model for its head."""
    return getattr(_open, "calls", None) is not None


def captured_call(
    processor: Any, lm_head: Any, hidden: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Take the arguments of `LogitsProcessor.forward` while `capturing`."""
    standing_in: torch.Tensor = torch.Tensor._make_subclass(_Untouchable, torch.empty(0))
    _open.calls.append(Captured(processor, lm_head, hidden, bias, standing_in))
    if processor.logits_as_input:
        raise _Touched("logits_as_input")
    return standing_in


def head_of(
    compute_logits: ComputeLogits, hidden: torch.Tensor, index: np.ndarray, vocab_size: int
) -> tuple[Head, torch.Tensor]:
    """The head and the hidden states [c, H'] that it takes, for hidden states [c, H].

    Args:
        compute_logits: the model's.
        index: [c], their places in the step.
        vocab_size: V; a head that serves another number of ids has `num_ids` of that number.
    """
    calls, plain = _capture(compute_logits, hidden)
    head = _shard(calls[0], index, vocab_size) if plain else None
    if head is not None:
        return head, calls[0].hidden
    if any(hasattr(call.processor, "lora_a_stacked") for call in calls):
        reason = "LoRA is enabled and the model changes its logits after the head"
        return Head(None, None, partial(_nan_logits, reason, vocab_size), 0, vocab_size), hidden
    return _whole_head(compute_logits, vocab_size), hidden


def _capture(compute_logits: ComputeLogits, hidden: torch.Tensor) -> tuple[list[Captured], bool]:
    """The calls of the head, and whether a single one's result is the model's answer."""
    calls: list[Captured] = []
    _open.calls = calls
    try:
        result = compute_logits(hidden)
    except _Touched:
        return calls, False
    finally:
        _open.calls = None
    return calls, len(calls) == 1 and result is calls[0].returned


def _whole_head(compute_logits: ComputeLogits, vocab_size: int) -> Head:
    """The model's own logits, gathered from all ranks; each rank reduces all of them."""

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        logits = compute_logits(rows)
        width = logits.shape[-1]
        if width == vocab_size:
            return logits
        reason = (
            f"the model's head gives {width} logits per row, its configuration says {vocab_size}"
        )
        return _nan_logits(reason, vocab_size, rows)

    return Head(None, None, logits_of, 0, vocab_size)


def _nan_logits(reason: str, vocab_size: int, rows: torch.Tensor) -> torch.Tensor:
    """Logits of a head that cannot be scored.

    An exception here would take the engine and everybody's requests down; NaN fails just these
    requests, with an error, at the front end.
    """
    logger.error("No scores: %s.", reason)
    return rows.new_full((len(rows), vocab_size), float("nan"))


def _shard(call: Captured, index: np.ndarray, vocab_size: int) -> Head | None:
    """This rank's part; None where the layer is not one whose layout is known."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    # LoRA wraps both layers.
    adapted = call.processor if hasattr(call.processor, "lora_a_stacked") else None
    processor = getattr(call.processor, "base_layer", call.processor)
    lm_head = getattr(call.lm_head, "base_layer", call.lm_head)
    if type(processor) is not LogitsProcessor or not isinstance(lm_head, VocabParallelEmbedding):
        return None
    shard = lm_head.shard_indices
    if processor.org_vocab_size != vocab_size or shard.num_added_elements:
        return None
    first, last = shard.org_vocab_start_index, min(shard.org_vocab_end_index, vocab_size)
    count = max(0, last - first)

    weight = _plain_weight(lm_head, call.hidden, count)
    bias = None if call.bias is None else call.bias[:count]

    def logits_of(rows: torch.Tensor) -> torch.Tensor:
        if weight is not None:
            return product(rows, weight, bias)
        logits: torch.Tensor = processor._apply_head(lm_head, rows, call.bias)
        return logits[:, :count]

    hooked = _has_hooks(call.lm_head)
    return Head(
        weight=None if hooked else weight,
        bias=bias,
        logits_of=partial(_through_hooks, call.lm_head, logits_of) if hooked else logits_of,
        first_id=first,
        num_ids=count,
        scale=float(processor.scale),
        soft_cap=float(processor.soft_cap or 0.0),
        gather=_gather if lm_head.tp_size > 1 else None,
        delta=None if adapted is None else _adapter_delta(adapted, index, first, count),
    )


def _has_hooks(lm_head: Any) -> bool:
    """Whether somebody hooked the head. vLLM itself never calls this layer.

    Where the head is the embedding itself, its hooks are the embedding's and have run there.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layer = getattr(lm_head, "base_layer", lm_head)
    hooked = lm_head._forward_hooks or lm_head._forward_pre_hooks
    return bool(hooked) and isinstance(layer, ParallelLMHead)


def _through_hooks(lm_head: Any, logits_of: ComputeLogits, rows: torch.Tensor) -> torch.Tensor:
    """`logits_of` called as the layer's forward, so that torch runs the hooks around it.

    They get and return this rank's logits [c, n].
    """
    lm_head.forward = logits_of
    try:
        logits: torch.Tensor = lm_head(rows)
    finally:
        del lm_head.forward
    return logits


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


def adapter_slots(layer: Any) -> set[int]:
    """The LoRA slots in use by adapters with weights for the head; a layer starts with none."""
    found: set[int] = vars(layer).setdefault(SLOTS, set())
    return found


def _adapter_delta(
    layer: Any, index: np.ndarray, first_id: int, num_ids: int
) -> ComputeLogits | None:
    """What adapters with weights for the head add to the logits of prompt rows.

    Args:
        layer: vLLM's `LogitsProcessorWithLoRA`. Its weights ``lora_a_stacked`` [slots, 1, r, H] and
            ``lora_b_stacked`` [slots, 1, V, r] are whole on every rank.
        index: [c], the rows' places in the step.
        first_id, num_ids: the range of token ids.

    Returns:
        Hidden states [c, H] to float32 [c, num_ids]; None when no adapter changes the head.
    """
    used = sorted(adapter_slots(layer))
    if not used:
        return None

    def delta(hidden: torch.Tensor) -> torch.Tensor:
        # The slot of every token of the step, -1 without an adapter.
        of_rows = layer.punica_wrapper.token_lora_indices[to_device(index, hidden.device)]
        out = torch.zeros(len(hidden), num_ids, dtype=torch.float32, device=hidden.device)
        for slot in used:
            a = layer.lora_a_stacked[slot, 0].float()
            b = layer.lora_b_stacked[slot, 0, first_id : first_id + num_ids].float()
            inner = (hidden.float() @ a.t()) * (of_rows == slot)[:, None]
            out.addmm_(inner, b.t())
        return out

    return delta


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """`values` on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _gather(values: torch.Tensor) -> torch.Tensor:
    """[c, ...] of every rank as [P, c, ...]."""
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_gather,
    )

    gathered = tensor_model_parallel_all_gather(values.contiguous(), 0)
    return gathered.view(get_tensor_model_parallel_world_size(), *values.shape)
