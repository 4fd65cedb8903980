"""Start an `LLM`, and say in one sentence why it does not start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.launch.log_file import LEVEL_VARIABLE, LogFile
from vllm.score.launch.reasons import remedy, root_cause
from vllm.score.launch.steps import long_step

if TYPE_CHECKING:
    from vllm import LLM

# Errors as they are, and all that vLLM logs.
DEBUG: ContextVar[bool] = ContextVar("DEBUG", default=False)

# Of the engine that runs, if it has processes of its own.
_log: LogFile | None = None


def start_llm(
    settings: Mapping[str, Any],
    *,
    progress: bool = True,
    options: Mapping[str, str] | None = None,
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> LLM:
    """A running `vllm.LLM`. While it starts, what vLLM prints goes to a file.

    The file is named where the start fails. With `DEBUG`, or where the user has set
    VLLM_LOGGING_LEVEL to DEBUG or INFO, nothing is held back.

    Args:
        settings: arguments of `vllm.LLM`; `model` among them.
        progress: whether to say on standard error that it starts, and when it runs.
        options: how the caller's users spell the arguments of `vllm.LLM`.
        prepare: makes the final settings of these; what it raises counts to the start.

    Raises:
        ScoreModeError: it does not start: the cause, what helps, and where the log is.
    """
    from vllm import LLM

    model = settings["model"]
    with (
        long_step(f"Starting vLLM with {str(model)!r}", "vLLM is ready", progress),
        _one_sentence(f"vLLM does not start {str(model)!r}", dict(options or {})),
    ):
        return LLM(**prepare(settings))


@contextmanager
def _one_sentence(failed: str, options: dict[str, str]) -> Iterator[None]:
    global _log
    if DEBUG.get():
        yield
        return
    log = None if _logs_are_wanted() else LogFile()
    try:
        if log is None:
            yield
        else:
            with log.receiving():
                yield
    except ScoreModeError:
        raise
    except Exception as error:
        text = ""
        if log is not None:
            log.add(error)
            text = log.text()
            log.keep()
        raise ScoreModeError(_sentence(failed, root_cause(error, text), options, log)) from None
    except BaseException:
        if log is not None:
            log.delete()
        raise
    if log is not None:
        _log = log  # its processes go on writing there


def later_failure(error: Exception, options: Mapping[str, str]) -> str:
    """One sentence for what nobody has foreseen, as an engine that ends while it runs.

    Its traceback is added to the engine's log.
    """
    log = _log or LogFile()
    text = log.text()
    log.add(error)
    log.keep()
    reason = root_cause(error, text)
    return _sentence("an unforeseen error", reason, dict(options), log) + " (--debug shows it)"


def _sentence(failed: str, reason: str, options: dict[str, str], log: LogFile | None) -> str:
    where = "see vLLM's log above" if log is None else f"the whole log is {log.path}"
    parts = (f"{failed}: {reason}", remedy(reason, options), where)
    return "; ".join(part for part in parts if part)


def _logs_are_wanted() -> bool:
    return os.environ.get(LEVEL_VARIABLE, "").upper() in ("DEBUG", "INFO")
