"""What long steps print: their lines on standard error, and an engine's output in a file."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"


@contextmanager
def long_step(begins: str, ended: str, progress: bool = True) -> Iterator[None]:
    """Print `begins`, and after the step `ended` and its time; nothing more where it fails.

    In a log, where no bar is drawn, these lines are all that a step shows.
    """
    say(begins, progress)
    started = time.perf_counter()
    yield
    say(f"{ended} ({time.perf_counter() - started:.1f} s)", progress)


def say(line: str, progress: bool) -> None:
    """Print a line on standard error, if progress is wanted."""
    if progress:
        print(line, file=sys.stderr, flush=True)


def shows_bars(progress: bool) -> bool:
    """Whether commands draw bars: on a terminal only, as a log keeps every state of a bar."""
    return progress and sys.stderr.isatty()


class LogFile:
    """A file that is deleted at the end of the program, unless something failed.

    Attributes:
        path: of it, in the folder for temporary files.
    """

    def __init__(self) -> None:
        descriptor, name = tempfile.mkstemp(prefix="vllm-score-", suffix=".log")
        os.close(descriptor)
        self.path = Path(name)
        atexit.register(self.path.unlink, missing_ok=True)

    def keep(self) -> None:
        atexit.unregister(self.path.unlink)

    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    def add(self, error: BaseException) -> None:
        """Write down an error with its traceback."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Within, standard output and standard error are this file, and vLLM logs its steps there.

        The file descriptors themselves, because compiled code and child processes write to them.
        Children that are started within keep writing to the file.
        """
        level = os.environ.get(LEVEL_VARIABLE)
        os.environ[LEVEL_VARIABLE] = "INFO"  # of children
        logger = logging.getLogger("vllm")
        own_level, own_handlers = logger.level, logger.handlers
        # Not vLLM's handler, which keeps the stream that was standard output at its import.
        handler = logging.FileHandler(self.path, encoding="utf-8")
        handler.setFormatter(
            logging.Formatter("%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s")
        )
        logger.handlers = [handler]
        logger.setLevel(logging.INFO)
        try:
            with _descriptors_to(self.path):
                yield
        finally:
            logger.setLevel(own_level)
            logger.handlers = own_handlers
            handler.close()
            if level is None:
                del os.environ[LEVEL_VARIABLE]
            else:
                os.environ[LEVEL_VARIABLE] = level


@contextmanager
def _descriptors_to(path: Path) -> Iterator[None]:
    _flush()
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    kept: dict[int, int] = {}
    try:
        for number in (1, 2):
            with suppress(OSError):  # closed, as a daemon's may be
                kept[number] = os.dup(number)
                os.dup2(file, number)
        yield
    finally:
        _flush()
        os.close(file)
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
