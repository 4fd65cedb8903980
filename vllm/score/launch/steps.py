"""Lines on standard error at the beginning and the end of what takes long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


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
