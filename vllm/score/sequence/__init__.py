"""Probability of given sequences after given contexts."""

from vllm.score.continuations import ContinuationScores
from vllm.score.sequence.boundary import BoundaryTokenizer, SplitTokens
from vllm.score.sequence.scorer import (
    SequenceProbability,
    SequenceProbVLLMHook,
    SequenceScorer,
    score_continuations,
)

__all__ = [
    "BoundaryTokenizer",
    "ContinuationScores",
    "SequenceProbVLLMHook",
    "SequenceProbability",
    "SequenceScorer",
    "SplitTokens",
    "score_continuations",
]
