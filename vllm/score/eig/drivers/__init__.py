"""Running decisions on an engine: `EngineDriver` on an `LLM`, `AsyncDriver` on an `AsyncLLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.score.eig.drivers.asynchronous import AsyncDriver as AsyncDriver
    from vllm.score.eig.drivers.engine import EngineDriver as EngineDriver

__all__ = ["AsyncDriver", "EngineDriver"]


def __getattr__(name: str) -> Any:
    # Loaded when used: the asynchronous engine is not everybody's.
    if name == "EngineDriver":
        from vllm.score.eig.drivers.engine import EngineDriver

        return EngineDriver
    if name == "AsyncDriver":
        from vllm.score.eig.drivers.asynchronous import AsyncDriver

        return AsyncDriver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
