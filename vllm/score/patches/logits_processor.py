"""Float32 logits from the model's own head, while scores are computed and where that is better."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch


def apply(module: ModuleType) -> None:
    """Wrap the product of the head; scale, soft cap and gathering stay with the stock layer."""
    plain = (module.UnquantizedEmbeddingMethod, module.UnquantizedLinearMethod)

    def apply_head(wrapped: Any, processor: Any, args: Any, kwargs: Any) -> Any:
        from vllm.score.ops.head import float32_logits_wanted, head_product

        def call(lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
            weight = getattr(lm_head, "weight", None)
            if (
                float32_logits_wanted()
                and isinstance(lm_head.quant_method, plain)
                and weight is not None
                and weight.ndim == 2
                and weight.shape[1] == hidden_states.shape[-1]
            ):
                return head_product(hidden_states, weight, embedding_bias)
            return wrapped(lm_head, hidden_states, embedding_bias)

        return call(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "LogitsProcessor._apply_head", apply_head)


PATCH = Patch(
    target="vllm.model_executor.layers.logits_processor",
    contract={
        "LogitsProcessor._apply_head": ("self", "lm_head", "hidden_states", "embedding_bias"),
    },
    apply=apply,
    roles=("worker",),
    why="Rounding logits to bfloat16 costs up to 0.06 nats; CPUs without bfloat16 instructions "
    "multiply float32 faster, too.",
    how="Inside a thread-local scope that only scoring opens, plain heads are multiplied in "
    "float32 by our own function; everything else is the stock path.",
    risk="None for generation: outside the scope the wrapper calls the stock function.",
    upstream="Related: head_dtype, which does the same for a whole engine.",
    remove_when="The kernels compute logits themselves.",
)
