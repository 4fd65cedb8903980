"""What LoRA adapters with weights for the language-model head add to the logits of prompt rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# On vLLM's LogitsProcessorWithLoRA: the slots whose adapter has weights for the head.
SLOTS = "score_mode_slots"


def slots(layer: Any) -> set[int]:
    """The slots in use, as `vllm.score.patches.worker` keeps them; a layer starts with none."""
    found: set[int] = vars(layer).setdefault(SLOTS, set())
    return found


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
        Hidden states [c, H] to float32 [c, num_ids]; None when no adapter changes the head.
    """
    from vllm.score.engine.host_copy import to_device

    used = sorted(slots(layer))
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
