"""Perplexity: windows, conventions, metrics with their errors, resumable runs.

from vllm.score.perplexity import perplexity
result = perplexity(llm, "text", context_length=2048, stride=512)
result.perplexity, result.figures, result.tokens()
"""

from vllm.score.perplexity.conventions import CONVENTIONS, Convention, longest_prompt
from vllm.score.perplexity.job import Job, Settings, prepare
from vllm.score.perplexity.metrics import Metric, PerplexityResult, Provenance
from vllm.score.perplexity.run import perplexity, run_job

Figure = Metric  # its former name

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Figure",
    "Job",
    "Metric",
    "PerplexityResult",
    "Provenance",
    "Settings",
    "longest_prompt",
    "perplexity",
    "prepare",
    "run_job",
]
