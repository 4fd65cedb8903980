"""Generation, teacher forcing and diagnostics of sampled sequences."""

from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.datasets import DATASET_REGISTRY, Example, register_dataset
from vllm.score.processor.processor import SequenceProcessor
from vllm.score.processor.results import (
    DiagnosticsPack,
    DiagnosticsResults,
    DistributionDiagnostics,
    LogprobResults,
    SequenceDiagnostics,
    TokenStepDiagnostics,
)
from vllm.score.processor.sequences import BatchedSequences

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
