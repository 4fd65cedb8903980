"""The data sets that prompts are drawn from, by name."""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Callable
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.processor.example_sources import Example, Gsm8kR1Template, local_file

__all__ = [
    "DATASET_REGISTRY",
    "Example",
    "Gsm8kR1Template",
    "Registry",
    "local_file",
    "register_dataset",
    "sample",
]


Entry = Callable[..., list[Example]]


class Registry(dict[str, Entry]):
    """Entries by name; an entry is called with `split=` and options and gives a list of examples.

    An example is anything with a `question` and, perhaps, an `answer`.
    """

    def __missing__(self, name: Any) -> Entry:
        close = difflib.get_close_matches(str(name), list(self), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ScoreModeError(
            f"there is no data set {name!r}{hint}; there are {', '.join(sorted(self))}, and "
            "register_dataset adds your own."
        )


DATASET_REGISTRY = Registry(gsm8k_r1_template=Gsm8kR1Template(), local_file=local_file)


def register_dataset(name: str, entry: Entry, *, replace: bool = False) -> None:
    """Add an entry to `DATASET_REGISTRY`.

    Raises:
        ScoreModeError: the name is taken (and `replace` not given), or the entry is no function.
    """
    if not callable(entry):
        raise ScoreModeError(
            f"the data set {name!r} must be a function of split= that returns examples, got "
            f"{entry!r:.80}."
        )
    if name in DATASET_REGISTRY and not replace:
        raise ScoreModeError(
            f"there is a data set {name!r} already; choose another name, or pass replace=True."
        )
    DATASET_REGISTRY[name] = entry


def sample(
    name: str, split: str, num: int | None = None, seed: int | None = None, **options: Any
) -> list[Any]:
    """Examples of a data set, drawn without replacement.

    Args:
        name: in `DATASET_REGISTRY`.
        split: of the data set, e.g. "train".
        num: how many, in random order; None for all, in their own order.
        seed: of the drawing; None draws anew each time.
        options: passed on to the entry.

    Raises:
        ScoreModeError: an unknown name, options that the entry does not take, fewer than `num`
            examples, or whatever the entry says.
    """
    entry = DATASET_REGISTRY[name]
    try:
        inspect.signature(entry).bind(split=split, **options)
    except TypeError as error:
        raise ScoreModeError(
            f"the data set {name!r} cannot be had with split={split!r} and the options "
            f"{', '.join(sorted(options)) or 'none'}: {error}."
        ) from error
    examples = list(entry(split=split, **options))
    if not examples:
        raise ScoreModeError(f"the data set {name!r} has no example in split {split!r}.")
    if num is None:
        return examples
    if not 1 <= num <= len(examples):
        raise ScoreModeError(
            f"{num} examples are asked of the data set {name!r}, split {split!r}, which has "
            f"{len(examples)}; ask for 1 to {len(examples)}, or None for all."
        )
    return random.Random(seed).sample(examples, num)
