"""Expected information gain reasoning: go on as long as a step tells more than it costs.

from vllm.score.eig import expected_information_gain_reasoning, print_eig_metrics

traces = expected_information_gain_reasoning(llm, questions, lambda_cost=0.05)
print_eig_metrics()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.score.eig.answers import AnswerFormat
    from vllm.score.eig.candidates import (
        BeamCandidates,
        ExtractedCandidates,
        GivenCandidates,
        SampledCandidates,
    )
    from vllm.score.eig.candidates.source import State
    from vllm.score.eig.core import (
        AnswerPosteriorEstimator,
        ExpectedInformationGainCalculator,
        MonteCarloForecaster,
    )
    from vllm.score.eig.drivers import AsyncDriver, EngineDriver
    from vllm.score.eig.metrics import (
        EIGMetrics,
        get_eig_metrics_summary,
        print_eig_metrics,
        reset_eig_metrics,
    )
    from vllm.score.eig.parameters import EIGParameters
    from vllm.score.eig.problems import eig_problems
    from vllm.score.eig.prompts import ContinuationPrompts
    from vllm.score.eig.registry import SCALERS, register_scaler
    from vllm.score.eig.scalers import (
        entropy_threshold_reasoning,
        expected_information_gain_reasoning,
        fixed_budget_reasoning,
    )

_HOMES = {
    "AnswerFormat": "answers",
    "AnswerPosteriorEstimator": "core",
    "AsyncDriver": "drivers",
    "BeamCandidates": "candidates",
    "ContinuationPrompts": "prompts",
    "EIGMetrics": "metrics",
    "EIGParameters": "parameters",
    "EngineDriver": "drivers",
    "ExpectedInformationGainCalculator": "core",
    "ExtractedCandidates": "candidates",
    "GivenCandidates": "candidates",
    "MonteCarloForecaster": "core",
    "SCALERS": "registry",
    "SampledCandidates": "candidates",
    "State": "candidates.source",
    "eig_problems": "problems",
    "entropy_threshold_reasoning": "scalers",
    "expected_information_gain_reasoning": "scalers",
    "fixed_budget_reasoning": "scalers",
    "get_eig_metrics_summary": "metrics",
    "print_eig_metrics": "metrics",
    "register_scaler": "registry",
    "reset_eig_metrics": "metrics",
}

__all__ = [
    "SCALERS",
    "AnswerFormat",
    "AnswerPosteriorEstimator",
    "AsyncDriver",
    "BeamCandidates",
    "ContinuationPrompts",
    "EIGMetrics",
    "EIGParameters",
    "EngineDriver",
    "ExpectedInformationGainCalculator",
    "ExtractedCandidates",
    "GivenCandidates",
    "MonteCarloForecaster",
    "SampledCandidates",
    "State",
    "eig_problems",
    "entropy_threshold_reasoning",
    "expected_information_gain_reasoning",
    "fixed_budget_reasoning",
    "get_eig_metrics_summary",
    "print_eig_metrics",
    "register_scaler",
    "reset_eig_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
