"""Folders made once and kept in the user's cache: each is there whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vllm.score.errors import ScoreModeError
from vllm.score.launch.output import long_step, say

CACHE_VARIABLE = "VLLM_SCORE_CACHE"
# What a model's folder must hold to be loaded.
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def default_cache_dir() -> Path:
    """Where this package keeps what it makes.

    What the environment variable VLLM_SCORE_CACHE names, else the user's cache directory (on
    Linux XDG_CACHE_HOME, or ~/.cache).
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("vllm-score")


def make_once(
    target: Path,
    name: str,
    *,
    files: Sequence[str],
    build: Callable[[Path], None],
    begins: str,
    progress: bool = True,
) -> None:
    """Make a folder unless it is there already.

    It is built beside the target and appears by one rename, when it is complete: a run that is
    killed leaves nothing that a later one would use. Of two processes at once, the second waits
    for the first.

    Args:
        target: the folder; its parent is made where it lacks.
        name: what is made, as sentences name it ("the embedded model").
        files: relative paths of files without which the folder is made anew: all of them come at
            once, but a user may have deleted some since.
        build: fills the empty folder that it is given.
        begins: what is said on standard error before, with how long it takes.
        progress: whether to say that, the time that it took, and that another process is waited
            for.

    Raises:
        ScoreModeError: where the folder cannot be written.
    """

    def complete() -> bool:
        return all((target / file).is_file() for file in files)

    if complete():
        return
    try:
        with _locked(target, name, progress):
            if not complete():
                with long_step(begins, f"Made {name}", progress):
                    _make(target, build)
    except OSError as error:
        raise ScoreModeError(
            f"{name} cannot be made in {target.parent} ({error}); set {CACHE_VARIABLE} "
            "to a folder that can be written"
        ) from error


@contextmanager
def _locked(target: Path, name: str, progress: bool) -> Iterator[None]:
    """The right to make this folder; the system takes it back from a process that dies."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parent / f"{target.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Another process is making {name}; waiting for it", progress)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(target: Path, build: Callable[[Path], None]) -> None:
    """Build beside the target, then rename. Called with the lock held."""
    prefix = f".{target.name}."
    for left in target.parent.glob(f"{prefix}*"):  # of runs that were killed: nobody has the lock
        shutil.rmtree(left, ignore_errors=True)
    building = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        build(building)
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
