"""The `tag_pref` reward: an answer in tags, and the right one."""

from __future__ import annotations

import atexit
import json
import logging
import os
import selectors
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from vllm.score.errors import ScoreModeError

OPEN, CLOSE = "<answer>", "</answer>"
SECONDS = 30.0  # until the comparison of two answers is given up, the process's start included
_SCRIPT = Path(__file__).with_name("math_equality.py")

logger = logging.getLogger(__name__)


def tag_pref(response: str, gold: str | None) -> float:
    """0.5 for one block in answer tags, and 0.5 more if its content equals gold by math-verify.

    Args:
        response: the generated text; what the prompt ended with is not needed.
        gold: the right answer; without one the reward is 0.

    Returns:
        0, 0.5 or 1; 0 too, with a warning in the log, where the comparison fails, for instance
        because gold is no mathematics.
    """
    if gold is None:
        return 0.0
    content = _only_block(response)
    if content is None:
        return 0.0
    try:
        return 1.0 if _judge.equal(gold, content) else 0.5
    except _Failure as error:
        _warn(f"No reward against the gold answer {gold!r:.200}: {error}.")
        return 0.0


def rewards(responses: list[list[str]], golds: list[str | None] | None) -> list[list[float]]:
    """`tag_pref` of every response.

    Args:
        responses: [B][G] texts.
        golds: [B] right answers, None for one that is not known, or for all.

    Returns:
        [B][G].

    Raises:
        ScoreModeError: as many golds as prompts are not given.
    """
    if golds is None:
        golds = [None] * len(responses)
    if len(golds) != len(responses):
        raise ScoreModeError(
            f"golds has {len(golds)} entries for {len(responses)} prompts; give one each, None "
            "where the answer is not known."
        )
    return [
        [tag_pref(response, gold) for response in group]
        for group, gold in zip(responses, golds, strict=True)
    ]


def _only_block(response: str) -> str | None:
    if response.count(OPEN) != 1 or response.count(CLOSE) != 1:
        return None
    before, after = response.split(OPEN)
    return None if CLOSE in before else after.split(CLOSE)[0]


@lru_cache(maxsize=1024)  # every reason once
def _warn(message: str) -> None:
    logger.warning(message)


class _Failure(Exception):
    """Two answers could not be compared; the message says why."""


class _Judge:
    """Compares answers in a process of its own, started when first needed, and again when it died.

    Usable from any thread, one comparison at a time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def equal(self, gold: str, content: str) -> bool:
        with self._lock:
            reply = self._ask(gold, content)
        if "error" in reply:
            raise _Failure(reply["error"])
        return bool(reply["equal"])

    def _ask(self, gold: str, content: str) -> dict[str, object]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([gold, content]).encode() + b"\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                line = process.stdout.readline() if ready.select(SECONDS) else None
        except OSError as error:
            self.stop()
            raise _Failure(f"the process of math-verify is gone: {error}") from error
        if not line:
            self.stop()
            raise _Failure(
                f"no result of math-verify after {SECONDS:g} s"
                if line is None
                else "the process of math-verify ended"
            )
        found: dict[str, object] = json.loads(line)
        return found

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        # A fork of this process must not share the pipes.
        if self._process is None or self._owner != os.getpid():
            # -P: beside the script lie modules named like the standard library's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_SCRIPT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not sent cannot be
                    pipe.close()


_judge = _Judge()
atexit.register(_judge.stop)
