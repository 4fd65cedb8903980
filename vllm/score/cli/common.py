"""What the commands share: their two streams, how an error looks, and refusals of options."""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from vllm.score.errors import ScoreModeError, ScoreModeUnavailable
from vllm.score.launch.engine import DEBUG, later_failure


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

    So do errors that nobody has foreseen, e.g. of an engine that ends; their traceback goes to a
    file. With `--debug` all stay as they are.
    """
    before = DEBUG.set(False)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the results has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if DEBUG.get():
            raise
        known = isinstance(error, (ScoreModeError, ScoreModeUnavailable))
        sentence = str(error) if known else later_failure(error)
        print(f"{program}: {sentence}", file=sys.stderr)
        sys.exit(1)
    finally:
        DEBUG.reset(before)


def option(name: str) -> str:
    """How a field is spelled on the command line."""
    return "--" + name.replace("_", "-")


def refuse_given(options: Namespace, names: Iterable[str], why: str) -> None:
    """Raise ScoreModeError for the first of these options that is given."""
    for name in names:
        value = getattr(options, name)
        if value not in (None, False):
            said = "given" if value is True else repr(value)
            raise ScoreModeError(f"{option(name)} is {said}, but {why}")


def check_output(
    field: str, name: str | None, endings: Sequence[str], inputs: Sequence[str] = ()
) -> Path | None:
    """The file, which can be written, is none of the inputs, and ends in what it holds.

    Raises:
        ScoreModeError: it is not.
    """
    if name is None:
        return None
    path, said = Path(name), f"{option(field)} {name!r}"
    if path.suffix.lower() not in endings:
        raise ScoreModeError(
            f"{said} is not of the kind that is written; name a file that ends in "
            f"{' or '.join(endings)}"
        )
    if any(path.resolve() == Path(each).resolve() for each in inputs):
        raise ScoreModeError(f"{said} is the text itself; name another file")
    if path.is_dir():
        raise ScoreModeError(f"{said} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ScoreModeError(f"{said} lies in a directory that does not exist; make it first")
    check_writable(said, path, path.absolute().parent)
    return path


def check_writable(said: str, path: Path, directory: Path) -> None:
    """Raise ScoreModeError where a file cannot be written, or none made in its directory."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ScoreModeError(
            f"{said} cannot be written ({error.strerror or error}); name another place"
        ) from error
