"""Generation, teacher forcing and diagnostics of sampled sequences."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.score.processor.diagnostics import DistributionDiagnostics
    from vllm.score.processor.examples import DATASET_REGISTRY, Example, register_dataset
    from vllm.score.processor.processor import SequenceProcessor
    from vllm.score.processor.types import (
        BatchedSequences,
        DiagnosticsPack,
        DiagnosticsResults,
        GenerationConfig,
        LogprobResults,
        SequenceDiagnostics,
        TokenStepDiagnostics,
    )

_HOMES = {
    "DATASET_REGISTRY": "examples",
    "BatchedSequences": "types",
    "DiagnosticsPack": "types",
    "DiagnosticsResults": "types",
    "DistributionDiagnostics": "diagnostics",
    "Example": "examples",
    "GenerationConfig": "types",
    "LogprobResults": "types",
    "SequenceDiagnostics": "types",
    "SequenceProcessor": "processor",
    "TokenStepDiagnostics": "types",
    "register_dataset": "examples",
}

__all__ = [
    "DATASET_REGISTRY",
    "BatchedSequences",
    "DiagnosticsPack",
    "DiagnosticsResults",
    "DistributionDiagnostics",
    "Example",
    "GenerationConfig",
    "LogprobResults",
    "SequenceDiagnostics",
    "SequenceProcessor",
    "TokenStepDiagnostics",
    "register_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"vllm.score.processor.{_HOMES[name]}"), name)
