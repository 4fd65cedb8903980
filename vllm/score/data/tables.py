"""Datasets on the Hugging Face Hub or saved in a folder, and whether the hub can be reached."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.score.data.sources import DatasetSource, Source
from vllm.score.data.streams import is_pattern
from vllm.score.errors import ScoreModeError, first_line

_PROBE_SECONDS = 5.0
_OFFLINE = "HF_HUB_OFFLINE"


def hub_source(
    dataset: str,
    config: str | None = None,
    *,
    split: str = "test",
    text_column: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    skip_empty: bool = False,
) -> Source:
    """A dataset of the Hugging Face Hub (or a folder written by `Dataset.save_to_disk`).

    Args:
        dataset: its name, e.g. "wikitext".
        config: its configuration, e.g. "wikitext-2-raw-v1".
        split: e.g. "test".
        text_column: by default "text".
        revision: branch, tag or commit.
        streaming: read rows as they are needed instead of downloading everything first.
        skip_empty: leave out rows whose text is null or empty.

    Raises:
        ScoreModeError: it cannot be had; the message says why and what to do.
    """
    import datasets

    name = "/".join(filter(None, (dataset, config, split)))
    check_folder(dataset)
    try:
        if Path(dataset).is_dir() and _is_saved(Path(dataset)):
            loaded = datasets.load_from_disk(dataset)
            if isinstance(loaded, dict):
                loaded = loaded[split]
        else:
            with offline_if_unreachable(dataset):
                loaded = datasets.load_dataset(
                    dataset, config, split=split, revision=revision, streaming=streaming
                )
    except KeyError as error:
        raise ScoreModeError(
            f"split {split!r} is not in dataset {dataset!r}; there are: "
            + ", ".join(repr(key) for key in loaded)
        ) from error
    except ConnectionError as error:
        raise ScoreModeError(
            f"dataset {dataset!r} is not on this machine and the Hugging Face Hub cannot be "
            "reached; fetch it elsewhere and pass a local file (.txt, .jsonl, .csv, .parquet), or "
            "set HF_ENDPOINT to a mirror"
        ) from error
    except Exception as error:  # ValueError for configs and splits, datasets' and HTTP errors
        raise ScoreModeError(
            f"dataset {name!r} cannot be loaded: {first_line(error)} (check dataset, config and "
            "split)"
        ) from error
    return DatasetSource(loaded, text_column, name, skip_empty=skip_empty)


def check_folder(dataset: str) -> None:
    """Refuse a local folder of which the datasets library would read other files.

    It takes the names of folders and of the files in them for patterns (`fsspec`), and so reads
    "data1" where "data[1]" is meant.

    Raises:
        ScoreModeError: a name has a character of patterns.
    """
    folder = Path(dataset)
    if not folder.is_dir():
        return
    names = [str(folder.absolute())]
    if _is_saved(folder):
        names = [name for name in names if "::" in name]  # only this is not read literally
    else:
        inside = (path.relative_to(folder) for path in folder.rglob("*"))
        names += [path.name for path in inside if not str(path).startswith(".")]
    for name in names:
        if is_pattern(name):
            raise ScoreModeError(
                f"dataset {dataset!r} is a folder, and the datasets library takes {name!r} for a "
                "pattern, not a name; rename it, or pass its files (--file, or a Path), whose "
                "names are taken as they are"
            )


def _is_saved(directory: Path) -> bool:
    return any((directory / file).exists() for file in ("state.json", "dataset_dict.json"))


@contextmanager
def offline_if_unreachable(name: str) -> Iterator[bool]:
    """Within, the Hugging Face libraries use only what is on this machine, here and in child
    processes, if the hub does not answer. Without this they retry for minutes before they look.

    Args:
        name: of a model or dataset; where it is a local path, nobody is asked.

    Yields:
        whether they are offline, by this or by the user's HF_HUB_OFFLINE.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or Path(name).exists() or hub_reachable(constants.ENDPOINT):
        yield constants.HF_HUB_OFFLINE
        return
    changed: list[tuple[Any, Any]] = [(os.environ, "1"), (vars(constants), True)]
    if "datasets" in sys.modules:  # has its own switch, read from the environment when imported
        changed.append((vars(sys.modules["datasets"].config), True))
    before = [switches.get(_OFFLINE) for switches, _ in changed]
    for switches, value in changed:
        switches[_OFFLINE] = value
    try:
        yield True
    finally:
        for (switches, _), value in zip(changed, before, strict=True):
            switches.pop(_OFFLINE)
            if value is not None:
                switches[_OFFLINE] = value


def hub_reachable(endpoint: str) -> bool:
    """Whether anybody answers at the hub's address, within seconds."""
    import requests

    try:
        requests.head(endpoint, timeout=_PROBE_SECONDS)
    except requests.RequestException:
        return False
    return True
