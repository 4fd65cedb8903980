"""`EngineCore.score_status()`: the engine core and its workers say whether they are patched."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from vllm.score.patches.patch import Patch


def score_status(engine_core: Any) -> list[dict[str, Any]]:
    """Status of the engine core and of each of its workers; reached as a utility call."""
    from vllm.score.engine.status import process_status, worker_status

    return [process_status("engine core"), *engine_core.collective_rpc(worker_status)]


def apply(module: ModuleType) -> None:
    """Add the method; an engine core without us lacks it, which the caller takes for a no."""
    module.EngineCore.score_status = score_status


PATCH = Patch(
    target="vllm.v1.engine.core",
    contract={"EngineCore.collective_rpc": ("self", "method", "timeout", "args", "kwargs")},
    apply=apply,
    holds=lambda module: module.EngineCore.score_status is score_status,
    roles=("engine core",),
    why="A score request must never reach a process that would answer it as ordinary generation.",
    how="A new method, called through the client's utility channel before the first score request.",
    risk="None known.",
    upstream="Not needed in a merged fork: every process then runs the same code.",
    remove_when="Score mode is part of vLLM.",
)
