"""Probability of given sequences after given contexts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.score.sequence.boundary import BoundaryTokenizer, SplitTokens
    from vllm.score.sequence.hook import SequenceProbVLLMHook

__all__ = ["BoundaryTokenizer", "SequenceProbVLLMHook", "SplitTokens"]

_HOMES = {
    "BoundaryTokenizer": "vllm.score.sequence.boundary",
    "SequenceProbVLLMHook": "vllm.score.sequence.hook",
    "SplitTokens": "vllm.score.sequence.boundary",
}


def __getattr__(name: str) -> Any:
    # Only what is asked for is imported: the names alone should cost nothing.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
