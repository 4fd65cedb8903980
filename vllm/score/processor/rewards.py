"""The `tag_pref` reward: an answer in tags, and the right one.

Run as a script, this file is the process that answers whether two mathematical texts are equal; so
it imports nothing of vLLM. math-verify limits its time by signals, which work in a main thread
only, and a power tower goes past any limit: there it has a main thread of its own, and whoever
waits can end the process.
"""

from __future__ import annotations

import logging
import re
import resource
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from functools import lru_cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

OPEN, CLOSE = "<answer>", "</answer>"
SECONDS = 3  # of each parsing and each comparison
MEMORY = 8 << 30  # bytes of the process
# Text without a word of letters is a formula; the names of LaTeX's commands are no words.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")

logger = logging.getLogger(__name__)


class AnswerJudge:
    """Says by math-verify whether two answers are equal, in a process of its own.

    The process starts when it is first needed and again when it died, and ends with this object.
    Usable from any thread, one comparison at a time.

    Args:
        seconds: until a comparison is given up, the process's start included.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool | str:
        """Whether they are equal, or why that cannot be said."""
        with self._lock:
            # In a process that was forked from this one, Popen says so of another's child, too.
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                self._pipe.send((gold, answer))
                if self._pipe.poll(self.seconds):
                    reply: bool | str = self._pipe.recv()
                    return reply
                reason = f"no result of math-verify after {self.seconds:g} s"
            except (OSError, EOFError):
                reason = "the process of math-verify ended"
            self._end()
            return reason

    def _start(self) -> None:
        """Not as a child of multiprocessing, which would import vLLM and the main module again."""
        self._pipe, theirs = Pipe()
        with theirs:
            # -P: beside the script lie modules named like others.
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._end = weakref.finalize(self, _end, self._pipe, self._process)


def _end(pipe: Connection, process: subprocess.Popen[bytes]) -> None:
    """End the process, if it is a child of this one."""
    pipe.close()
    process.kill()
    process.wait()


def tag_pref(response: str, gold: str | None, judge: AnswerJudge) -> float:
    """0.5 for one block in answer tags, and 0.5 more if its content equals gold by math-verify.

    Args:
        response: the generated text; what the prompt ended with is not needed.
        gold: the right answer; without one the reward is 0.

    Returns:
        0, 0.5 or 1; 0 too, with a warning in the log, where the comparison fails, for instance
        because gold is no mathematics.
    """
    parts = re.split(f"({OPEN}|{CLOSE})", response)
    if gold is None or parts[1::2] != [OPEN, CLOSE]:
        return 0.0
    verdict = judge.equal(gold, parts[2])
    if isinstance(verdict, str):
        _warn(f"No reward against the gold answer {gold!r:.200}: {verdict}.")
        return 0.0
    return 1.0 if verdict else 0.5


@lru_cache(maxsize=1024)  # every reason once
def _warn(message: str) -> None:
    logger.warning(message)


# The process


def parsed(text: str) -> list[Any]:
    """What math-verify reads in a text; nothing if it holds no mathematics."""
    from math_verify import parse

    text = text.strip()
    found: list[Any] = []
    if text and not _WORD.search(text) and not _DELIMITER.search(text):
        # It finds formulae between delimiters only, and elsewhere the last number.
        found = parse(f"${text}$", parsing_timeout=SECONDS)
    return found or list(parse(text, parsing_timeout=SECONDS))


def verdict(gold: str, answer: str) -> bool | str:
    """Whether they are equal, or why that cannot be said."""
    try:
        from math_verify import verify

        expected = parsed(gold)
        if not expected:
            return "math-verify finds no mathematics in the gold answer"
        return bool(verify(expected, parsed(answer), timeout_seconds=SECONDS))
    except ImportError as error:
        return f"{error}; install vllm-score[processor]"
    except Exception as error:  # sympy's, of any kind
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Get (gold, answer) and give back the verdict, until the other side closes the pipe.

    The script's argument is the number of the pipe's descriptor.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        while True:
            pipe.send(verdict(*pipe.recv()))


if __name__ == "__main__":
    main()
