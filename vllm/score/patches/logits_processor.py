"""The head's arguments, handed over while scores are computed."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Wrap the call that ends nearly every model's compute_logits."""

    def forward(wrapped: Any, processor: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.engine.model_head import captured_call, capturing

        if not capturing():
            return wrapped(*args, **kwargs)
        if processor is None:
            # LoRA's layer, which is no LogitsProcessor, calls the function with itself.
            processor, *args = args

        def call(
            lm_head: Any, hidden_states: Any, embedding_bias: Any = None, skip_gather: bool = False
        ) -> Any:
            return captured_call(processor, lm_head, hidden_states, embedding_bias)

        return call(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "LogitsProcessor.forward", forward)


PATCH = Patch(
    target="vllm.model_executor.layers.logits_processor",
    contract={
        "LogitsProcessor.forward": (
            "self",
            "lm_head",
            "hidden_states",
            "embedding_bias",
            "skip_gather",
        ),
    },
    apply=apply,
    roles=("worker",),
    why="Scores are reduced on each rank's own part of the head, in float32, without ever holding "
    "a row of logits; stock gathers them, rounded to the model's dtype.",
    how="Inside a thread-local scope that only scoring opens, the call gives its arguments away "
    "and returns a tensor that nothing may touch; a model that does touch it is asked for its "
    "logits instead.",
    risk="None for generation: outside the scope the wrapper calls the stock function.",
    upstream="Related: get_top_k_tokens, which reduces shards in the same way.",
    remove_when="LogitsProcessor offers a reduction over the shard.",
)
