"""The error of a request that cannot be scored."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.score.checks import check
from vllm.score.errors import ScoreModeError


class InvalidScoreRequest(VLLMValidationError, ScoreModeError):
    """Caught as ValueError offline, answered with status 400 by the server.

    Args:
        message: names the field, the value and the remedy.
        parameter: the field.
        value: what was given.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter, value=value)

    def __str__(self) -> str:
        # The sentence names both already; the stock class would append them.
        return str(self.args[0])


def check_field(field: str, value: Any, kind: Any) -> Any:
    """`vllm.score.checks.check` of a field of a request.

    Raises:
        InvalidScoreRequest: the value is not of that kind.
    """
    try:
        return check(field, value, kind)
    except ScoreModeError as error:
        raise InvalidScoreRequest(str(error), parameter=field, value=value) from None
