"""What LoRA adapters with weights for the language-model head add to the logits of prompt rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)


def adapter_delta(
    layer: Any, index: np.ndarray, first_id: int, num_ids: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The low-rank term of each row's adapter, for a range of token ids.

    Args:
        layer: vLLM's `LogitsProcessorWithLoRA`. Its weights ``lora_a_stacked`` [slots, 1, r, H] and
            ``lora_b_stacked`` [slots, 1, V, r] are whole on every rank.
        index: [c], the rows' places in the step.
        first_id, num_ids: the range.

    Returns:
        Hidden states [c, H] to float32 [c, num_ids]; None when no adapter changes the head. Rows
        that vLLM has computed with an adapter that is not theirs get NaN.
    """
    from vllm.score.engine.host_copy import to_device
    from vllm.score.patches.lora_layers_logits_processor import slots

    used = sorted(slots(layer))
    mixed = _mixed_on_cpu(layer)
    if not used and not mixed:
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
        if mixed and bool((of_rows == -1).any()):
            logger.error(
                "No scores for rows without an adapter beside rows with one: on a CPU vLLM "
                "computes them with an adapter. Score them apart, as vllm.score.score does."
            )
            out[of_rows == -1] = float("nan")
        return out

    return delta


def _mixed_on_cpu(layer: Any) -> bool:
    """Whether the step has rows with an adapter and rows without.

    vLLM 0.32.0 on a CPU takes -1, "no adapter", for the index of the last slot in such a step.
    """
    of_rows = layer.punica_wrapper.token_lora_indices
    if of_rows.device.type != "cpu":
        return False
    without = of_rows == -1
    return bool(without.any()) and not bool(without.all())
