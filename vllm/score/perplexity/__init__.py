"""Perplexity: windows, conventions, figures with their errors, resumable runs.

from vllm.score.perplexity import perplexity
result = perplexity(llm, "text", context_length=2048, stride=512)
result.perplexity, result.figures, result.tokens()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.score.perplexity.conventions import CONVENTIONS, Convention, longest_prompt
    from vllm.score.perplexity.result import Figure, PerplexityResult, Provenance
    from vllm.score.perplexity.run import perplexity

__all__ = [
    "CONVENTIONS",
    "Convention",
    "Figure",
    "PerplexityResult",
    "Provenance",
    "longest_prompt",
    "perplexity",
]

_WHERE = {
    "CONVENTIONS": "conventions",
    "Convention": "conventions",
    "longest_prompt": "conventions",
    "Figure": "result",
    "PerplexityResult": "result",
    "Provenance": "result",
    "perplexity": "run",
}


def __getattr__(name: str) -> Any:
    # Only what is asked for is imported: the names alone should cost nothing.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
