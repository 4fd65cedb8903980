"""Which LoRA slots hold an adapter that changes the head itself."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Wrap the loading and the removal of a slot's weights."""

    def set_lora(wrapped: Any, layer: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.engine.model_head import adapter_slots

        result = wrapped(*args, **kwargs)
        adapter_slots(layer).add(kwargs.get("index", args[0] if args else None))
        return result

    def reset_lora(wrapped: Any, layer: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.engine.model_head import adapter_slots

        adapter_slots(layer).discard(kwargs.get("index", args[0] if args else None))
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "LogitsProcessorWithLoRA.set_lora", set_lora)
    wrapt.wrap_function_wrapper(module, "LogitsProcessorWithLoRA.reset_lora", reset_lora)


PATCH = Patch(
    target="vllm.lora.layers.logits_processor",
    contract={
        "LogitsProcessorWithLoRA.set_lora": ("self", "index", "lora_a", "lora_b"),
        "LogitsProcessorWithLoRA.reset_lora": ("self", "index"),
    },
    apply=apply,
    roles=("worker",),
    why="Upstream applies an adapter's head with an index made for sampled rows, one a request; "
    "on prompt rows it would take other rows' adapters.",
    how="The slots with such weights are remembered; scoring adds their product itself, by the "
    "adapter of each row, and skips it when there are none.",
    risk="An adapter whose head weights were loaded past these two functions would be left out.",
    upstream="Issue: prompt log-probabilities with an adapter on the LM head.",
    remove_when="LogitsProcessorWithLoRA takes the rows' adapters as an argument.",
)
