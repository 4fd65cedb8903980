"""Refusals of the commands that need no engine: field, value, remedy."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import conventions as known

DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model that is named as the argument or by --model."""
    if argument is not None and option not in (None, argument):
        raise ScoreModeError(f"two models are named, {argument!r} and --model {option!r}; name one")
    return option if argument is None else argument


def check_positive(**numbers: int | None) -> None:
    """Numbers of at least 1, where they are given."""
    for field, value in numbers.items():
        if value is not None and value < 1:
            option = "--" + field.replace("_", "-")
            raise ScoreModeError(f"{option} is {value}; it must be at least 1")


def check_store(store: Path | None, resume: bool) -> None:
    """`--resume` needs a store; without it the store must be empty or new."""
    if store is None:
        if resume:
            raise ScoreModeError(
                "--resume is given without --store; name the directory of the run to go on with"
            )
        return
    if store.exists() and not store.is_dir():
        raise ScoreModeError(f"--store {str(store)!r} is a file; name a directory")
    if (store / "manifest.json").exists() and not resume:
        raise ScoreModeError(
            f"--store {str(store)!r} already holds a run; add --resume to go on with it, or name "
            "another directory"
        )
    existing = next(folder for folder in (store, *store.absolute().parents) if folder.is_dir())
    _check_writable("--store", store, existing)


def check_engine(dtype: str, gpu_memory_utilization: float | None) -> None:
    """What vLLM would refuse in many lines."""
    if dtype not in DTYPES:
        raise ScoreModeError(f"--dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if gpu_memory_utilization is not None and not 0 < gpu_memory_utilization <= 1:
        raise ScoreModeError(
            f"--gpu-memory-utilization is {gpu_memory_utilization}; it must be above 0 and at "
            "most 1"
        )


def check_no_model(**given: str | None) -> None:
    """Options that say something of a model, where none is named."""
    for field, value in given.items():
        if value is not None:
            raise ScoreModeError(
                f"--{field} is {value!r}, but no model is named; add --model MODEL"
            )


def check_no_file(**given: str | bool | None) -> None:
    """Options that say something of a table, where no file is named."""
    for field, value in given.items():
        if value is not None:
            option = "--" + field.replace("_", "-")
            what = "given" if value is True else repr(value)
            raise ScoreModeError(f"{option} is {what}, but no file is named; add --file PATH")


def check_output(
    option: str, path: Path | None, endings: Sequence[str], inputs: Sequence[str] = ()
) -> None:
    """A file that can be written, none of the inputs, with an ending that says what it holds."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ScoreModeError(
            f"{option} {str(path)!r} is not of the kind that is written; name a "
            f"file that ends in {' or '.join(endings)}"
        )
    if any(path.resolve() == Path(name).resolve() for name in inputs):
        raise ScoreModeError(f"{option} {str(path)!r} is the text itself; name another file")
    if path.is_dir():
        raise ScoreModeError(f"{option} {str(path)!r} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ScoreModeError(
            f"{option} {str(path)!r} lies in a directory that does not exist; make it first"
        )
    _check_writable(option, path, path.absolute().parent)


def check_fits_model(
    longest: int | None, model: str, context_length: int, conventions: Sequence[str]
) -> None:
    """Every window within the `longest` that the model's configuration allows (None: unknown)."""
    if longest is None:
        return
    takes = f"more than the {longest} tokens that {model!r} takes (max_position_embeddings)"
    if context_length > longest:
        raise ScoreModeError(
            f"--context-length is {context_length}, {takes}; pass "
            f"--context-length {longest} or less, and a --stride of at most that"
        )
    listed = [*known.CONVENTIONS] if "all" in conventions else conventions
    for name in listed:
        size = known.longest_window([name], context_length)
        if size > longest:
            bare = name.partition(":")[0]
            raise ScoreModeError(
                f"--convention {name} has windows of {size} tokens, {takes}; ask for "
                f"{bare}:{longest} or less"
            )


def _check_writable(option: str, path: Path, directory: Path) -> None:
    try:
        tempfile.TemporaryFile(dir=directory).close()
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ScoreModeError(
            f"{option} {str(path)!r} cannot be written ({error.strerror or error}); name another "
            "place"
        ) from error
