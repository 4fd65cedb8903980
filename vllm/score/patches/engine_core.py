"""`EngineCore.score_status()`: the engine core and its workers say whether they are patched;
`score_empty_cache()`: NaN in the KV cache does not outlive the request that left it there.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm.score.patches.patch import Patch


def score_status(engine_core: Any) -> list[dict[str, Any]]:
    """Status of the engine core and of each of its workers; reached as a utility call."""
    from vllm.score.patches.status import process_status, worker_status

    return [process_status("engine core"), *engine_core.collective_rpc(worker_status)]


def score_empty_cache(engine_core: Any) -> bool:
    """Empty the KV cache, NaN included; reached as a utility call, between steps."""
    from vllm.score.engine.kv_cache import empty_kv_cache

    return empty_kv_cache(engine_core)


def apply(module: ModuleType) -> None:
    """Add the methods; an engine core without us lacks them, which the caller takes for a no."""
    module.EngineCore.score_status = score_status
    module.EngineCore.score_empty_cache = score_empty_cache


PATCH = Patch(
    target="vllm.v1.engine.core",
    contract={
        "EngineCore.collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
        "EngineCore.reset_prefix_cache": ("self",),
    },
    apply=apply,
    holds=lambda module: (
        module.EngineCore.score_status is score_status
        and module.EngineCore.score_empty_cache is score_empty_cache
    ),
    roles=("engine core",),
    why="A score request must never reach a process that would answer it as ordinary generation. "
    "NaN in a block of the KV cache spoils every later request that is given the block.",
    how="New methods, called through the client's utility channel: before the first score request, "
    "and before the first one after a NaN, if no block is in use.",
    risk="None known.",
    upstream="Not needed in a merged fork: every process then runs the same code.",
    remove_when="Score mode is part of vLLM.",
)
