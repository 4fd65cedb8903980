"""The cause of a failure, found in real tracebacks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm.score.launch.reasons import root_cause

GENERIC = RuntimeError("Engine core initialization failed. See root cause above. Failed: {}")
WORKER = """
def load():
    raise RuntimeError("Cannot find any model weights")
"""
CHAINED = """
def load():
    try:
        {}["rope"]
    except KeyError as error:
        raise ValueError("config.json has no rope,\\n  which this model needs") from error
"""
ASSERTION = """
def load():
    rows = 3
    assert rows == 4
"""


def process_output(code: str, prefix: str) -> str:
    """What an interpreter prints when `load` fails, each line as vLLM marks a process's."""
    program = f"{code}\nload()\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return "".join(f"{prefix}{line}\n" for line in done.stderr.splitlines())


@pytest.mark.parametrize("prefix", ["", "(Worker pid=7) ERROR 11-29 09:32:23 [core.py:15] "])
@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (WORKER, "Cannot find any model weights"),
        (CHAINED, "config.json has no rope, which this model needs"),
        (ASSERTION, "AssertionError"),
    ],
)
def test_the_first_process_that_failed_names_the_cause(prefix: str, code: str, cause: str) -> None:
    first = process_output(code, prefix)
    later = process_output(
        f"def load(): raise RuntimeError({str(GENERIC)!r})", "(EngineCore pid=3) "
    )
    log = "INFO 11-29 09:32:20 [core.py:1] starting\n" + first + later
    assert root_cause(GENERIC, log).startswith(cause)


def test_errors_of_this_process_need_no_log() -> None:
    assert root_cause(RuntimeError("no\n  memory.")) == "no memory"
    assert root_cause(ValueError("no dtype")) == "no dtype"
    try:
        rows = 3
        assert rows == 4
    except AssertionError as error:
        assert root_cause(AssertionError().with_traceback(error.__traceback__)) == (
            "AssertionError at `assert rows == 4`"
        )


def test_a_process_that_was_killed_is_named() -> None:
    error = RuntimeError("See root cause above. Failed core proc(s): {'EngineCore': -9}")
    assert root_cause(error, "nothing") == "the process EngineCore was ended by signal 9"
