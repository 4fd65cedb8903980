"""The `tag_pref` reward: an answer in tags, and the right one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing import Pipe
from pathlib import Path

from vllm.score.errors import ScoreModeError

OPEN, CLOSE = "<answer>", "</answer>"
_SCRIPT = Path(__file__).with_name("math_equality.py")

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
        self._child: _Child | None = None

    def equal(self, gold: str, answer: str) -> bool | str:
        """Whether they are equal, or why that cannot be said."""
        with self._lock:
            if self._child is None or not self._child.is_usable():
                self._child = _Child()
                self._end = weakref.finalize(self, self._child.end)
            try:
                self._child.pipe.send((gold, answer))
                if self._child.pipe.poll(self.seconds):
                    reply: bool | str = self._child.pipe.recv()
                    return reply
                reason = f"no result of math-verify after {self.seconds:g} s"
            except (OSError, EOFError):
                reason = "the process of math-verify ended"
            self._end()
            self._child = None
            return reason


class _Child:
    """A process that runs `math_equality.py`, and the pipe to it.

    Not a child of multiprocessing, which would import vLLM and the main module once more.
    """

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        self._owner = os.getpid()
        # -P: beside the script lie modules named like others.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()

    def is_usable(self) -> bool:
        """Whether it runs, and not for the process that this one was forked from."""
        return self._owner == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        """End it, if it is this process's."""
        self.pipe.close()
        if self._owner == os.getpid():
            self.process.kill()
            self.process.wait()


def tag_pref(response: str, gold: str | None, judge: AnswerJudge) -> float:
    """0.5 for one block in answer tags, and 0.5 more if its content equals gold by math-verify.

    Args:
        response: the generated text; what the prompt ended with is not needed.
        gold: the right answer; without one the reward is 0.

    Returns:
        0, 0.5 or 1; 0 too, with a warning in the log, where the comparison fails, for instance
        because gold is no mathematics.
    """
    if gold is None or response.count(OPEN) != 1 or response.count(CLOSE) != 1:
        return 0.0
    before, after = response.split(OPEN)
    if CLOSE in before:
        return 0.0
    verdict = judge.equal(gold, after.split(CLOSE)[0])
    if isinstance(verdict, str):
        _warn(f"No reward against the gold answer {gold!r:.200}: {verdict}.")
        return 0.0
    return 1.0 if verdict else 0.5


def rewards(
    responses: Sequence[Sequence[str]], golds: Sequence[str | None], judge: AnswerJudge
) -> list[list[float]]:
    """`tag_pref` of every response.

    Args:
        responses: [B][G] texts.
        golds: [B] right answers, None for one that is not known.

    Returns:
        [B][G].

    Raises:
        ScoreModeError: as many golds as prompts are not given.
    """
    if len(golds) != len(responses):
        raise ScoreModeError(
            f"golds has {len(golds)} entries for {len(responses)} prompts; give one each, None "
            "where the answer is not known."
        )
    return [
        [tag_pref(response, gold, judge) for response in group]
        for group, gold in zip(responses, golds, strict=True)
    ]


@lru_cache(maxsize=1024)  # every reason once
def _warn(message: str) -> None:
    logger.warning(message)
