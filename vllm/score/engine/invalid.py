"""The error of a request that cannot be scored."""

from __future__ import annotations

from vllm.exceptions import VLLMValidationError
from vllm.score.errors import ScoreModeError


class InvalidScoreRequest(VLLMValidationError, ScoreModeError):
    """Caught as ValueError offline, answered with status 400 by the server.

    Args:
        message: names the field, the value and the remedy.
        parameter: the field.
        value: what was given.
    """
