"""Score mode for vLLM: the exact log-probability of given tokens, on the weights that are served.

Not to be confused with vLLM's own `LLM.score`, which compares texts with pooling models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vllm

if getattr(vllm, "__file__", None) is None:  # there is only our part of the package
    from vllm.score.errors import HOW_TO_INSTALL_VLLM

    raise ModuleNotFoundError(
        f"vllm-score is installed, but vLLM is not; {HOW_TO_INSTALL_VLLM}", name="vllm"
    )

if TYPE_CHECKING:
    from vllm.score.api import ScoreRequest, score
    from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
    from vllm.score.results import TokenScores
    from vllm.score.sequence.scorer import score_continuations

__all__ = [
    "ScoreModeError",
    "ScoreModeUnavailable",
    "ScoreRequest",
    "TokenScores",
    "score",
    "score_continuations",
]

_HOMES = {
    "ScoreModeError": "errors",
    "ScoreModeUnavailable": "errors",
    "ScoreRequest": "api",
    "TokenScores": "results",
    "score": "api",
    "score_continuations": "sequence.scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
