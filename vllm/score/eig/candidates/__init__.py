"""Where candidate answers come from."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

from vllm.score.eig.candidates.beam import BeamCandidates
from vllm.score.eig.candidates.extracted import ExtractedCandidates
from vllm.score.eig.candidates.given import GivenCandidates
from vllm.score.eig.candidates.sampled import SampledCandidates
from vllm.score.eig.candidates.source import CandidateSource, NoCandidates, State
from vllm.score.errors import ScoreModeError

__all__ = [
    "CANDIDATE_SOURCES",
    "BeamCandidates",
    "CandidateSource",
    "ExtractedCandidates",
    "GivenCandidates",
    "NoCandidates",
    "SampledCandidates",
    "State",
    "candidate_source",
]

CANDIDATE_SOURCES: dict[str, Callable[[], CandidateSource]] = {
    "beam": BeamCandidates,
    "sampled": SampledCandidates,
    "numeric": lambda: ExtractedCandidates("numeric"),
    "boxed": lambda: ExtractedCandidates("boxed"),
}


def candidate_source(
    source: str | Sequence[str] | re.Pattern[str] | CandidateSource,
) -> CandidateSource:
    """A source from its name ("beam", "sampled", "numeric" or "boxed"), from a list of answers, or
    from a compiled regular expression; a source is returned as it is.

    Raises:
        ScoreModeError: for anything else.
    """
    if isinstance(source, str):
        return _by_name(source)
    if isinstance(source, re.Pattern):
        return ExtractedCandidates(source)
    if isinstance(source, Sequence):
        return GivenCandidates(list(source))
    if isinstance(source, CandidateSource) and not isinstance(source, type):
        return source
    raise ScoreModeError(f"candidates is {source!r}; {_remedy()}.")


def _by_name(name: str) -> CandidateSource:
    if name in CANDIDATE_SOURCES:
        return CANDIDATE_SOURCES[name]()
    if name == "given":
        raise ScoreModeError(
            "candidates is 'given', but no answers are; pass the list of answers itself."
        )
    close = difflib.get_close_matches(name, CANDIDATE_SOURCES, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ScoreModeError(f"candidates is {name!r}{hint}; {_remedy()}.")


def _remedy() -> str:
    return f"give one of {', '.join(CANDIDATE_SOURCES)}, a list of answers, or a CandidateSource"
