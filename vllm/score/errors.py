"""The errors of this package."""

from __future__ import annotations


class ScoreModeError(ValueError):
    """A request, an argument or an input that cannot be used; the message says which and why."""


class ScoreModeUnavailable(RuntimeError):
    """Score mode cannot run in this installation; the message says why and what to do."""
