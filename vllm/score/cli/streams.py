"""What goes to standard output, what to standard error, and how an error looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO


@contextmanager
def results_stream() -> Iterator[TextIO]:
    """Standard output, for results only: whatever else is printed there goes to standard error.

    vLLM logs to standard output, its compiled parts and its worker processes print there too; so
    the file descriptor itself points to standard error meanwhile.
    """
    ours = sys.stdout
    ours.flush()
    try:
        is_descriptor = ours.fileno() == 1
    except (OSError, AttributeError):
        is_descriptor = False
    if not is_descriptor:  # replaced by somebody, as tests do
        with redirect_stdout(sys.stderr):
            yield ours
        return
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with (
            open(kept, "w", encoding=ours.encoding, errors=ours.errors, closefd=False) as results,
            redirect_stdout(sys.stderr),
        ):
            yield results
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Errors that a user can mend become one line on standard error and exit code 1.

    So do errors that nobody has foreseen, as of an engine that ends; their traceback goes to a
    file. With `--debug` all stay as they are.
    """
    from vllm.score.cli.engine import OPTIONS
    from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
    from vllm.score.launch.start import DEBUG, later_failure

    before = DEBUG.set(False)
    try:
        yield
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if DEBUG.get():
            raise
        known = isinstance(error, (ScoreModeError, ScoreModeUnavailable))
        sentence = str(error) if known else later_failure(error, OPTIONS)
        print(f"{program}: {sentence}", file=sys.stderr)
        sys.exit(1)
    finally:
        DEBUG.reset(before)
