"""Expected information gain reasoning: go on as long as a step tells more than it costs.

from vllm.score.eig import expected_information_gain_reasoning, print_eig_metrics

traces = expected_information_gain_reasoning(llm, questions, lambda_cost=0.05)
print_eig_metrics()
"""

from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.candidates import (
    BeamCandidates,
    ExtractedCandidates,
    GivenCandidates,
    SampledCandidates,
    State,
)
from vllm.score.eig.engines import AsyncLLMReasoner, LLMReasoner
from vllm.score.eig.options import ContinuationPrompts, Options
from vllm.score.eig.posterior import AnswerPosteriorEstimator, MonteCarloForecaster
from vllm.score.eig.reasoning import (
    eig_problems,
    entropy_threshold_reasoning,
    expected_information_gain_reasoning,
    fixed_budget_reasoning,
    reason,
)
from vllm.score.eig.records import Decision, Trace
from vllm.score.eig.report import (
    EIGMetrics,
    get_eig_metrics_summary,
    print_eig_metrics,
    reset_eig_metrics,
)
from vllm.score.eig.rules import (
    RULES,
    DecisionPoint,
    EntropyThreshold,
    ExpectedInformationGain,
    ExpectedInformationGainCalculator,
    FixedBudget,
    StoppingRule,
    register_scaler,
)

# Earlier names.
AsyncDriver = AsyncLLMReasoner
EIGParameters = ExpectedInformationGain
EngineDriver = LLMReasoner
SCALERS = RULES

__all__ = [
    "RULES",
    "SCALERS",
    "AnswerFormat",
    "AnswerPosteriorEstimator",
    "AsyncDriver",
    "AsyncLLMReasoner",
    "BeamCandidates",
    "ContinuationPrompts",
    "Decision",
    "DecisionPoint",
    "EIGMetrics",
    "EIGParameters",
    "EngineDriver",
    "EntropyThreshold",
    "ExpectedInformationGain",
    "ExpectedInformationGainCalculator",
    "ExtractedCandidates",
    "FixedBudget",
    "GivenCandidates",
    "LLMReasoner",
    "MonteCarloForecaster",
    "Options",
    "SampledCandidates",
    "State",
    "StoppingRule",
    "Trace",
    "eig_problems",
    "entropy_threshold_reasoning",
    "expected_information_gain_reasoning",
    "fixed_budget_reasoning",
    "get_eig_metrics_summary",
    "print_eig_metrics",
    "reason",
    "register_scaler",
    "reset_eig_metrics",
]
