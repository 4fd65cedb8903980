"""`datasets` objects, in memory, on disk or on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.score.data.columns import NAME_ANOTHER, text_column
from vllm.score.data.rows import FILL_IN, Skipped
from vllm.score.data.source import Piece, Source
from vllm.score.data.streams import is_pattern
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import check_encodable

_PROBE_SECONDS = 5.0


class DatasetSource(Source):
    """A `datasets.Dataset` or `datasets.IterableDataset`: one document a row.

    Args:
        dataset: the rows.
        column: the text column; by default "text".
        skip_empty: leave out rows whose text is null or empty.
    """

    def __init__(
        self,
        dataset: Any,
        column: str | None = None,
        name: str = "dataset",
        *,
        skip_empty: bool = False,
    ) -> None:
        self.name = name
        self.skip_empty = skip_empty
        self._sha256: str | None = None
        self._dataset = dataset
        names = dataset.column_names
        if names is None:  # a stream that has not been looked into
            names = list(next(iter(dataset), {}))
        self._column = text_column(names, column, name)
        self._skipped = Skipped((self._column,)) if skip_empty else None

    def pieces(self) -> Iterator[Piece]:
        return enumerate(self._texts())

    def check(self) -> None:
        self.content_sha256()

    def notes(self) -> list[str]:
        return [] if self._skipped is None else self._skipped.notes()

    def content_sha256(self) -> str | None:
        if not hasattr(self._dataset, "__len__"):
            return None  # a stream: reading it twice may be dear
        if self._sha256 is None:
            digest = hashlib.sha256()
            for document, text in self.pieces():
                data = check_encodable(text, f"document {document}")
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
            self._sha256 = digest.hexdigest()
        return self._sha256

    def _texts(self) -> Iterator[str]:
        if self._skipped is not None:
            self._skipped.clear()
        for number, text in enumerate(self._values(), 1):
            if isinstance(text, str) and (text or self._skipped is None):
                yield text
                continue
            where = f"{self.name}, row {number}"
            if text is not None and text != "":
                raise ScoreModeError(
                    f"{where}: {self._column!r} is {text!r:.80} ({type(text).__name__}), not "
                    f"text; {NAME_ANOTHER}"
                )
            if self._skipped is None:
                raise ScoreModeError(f"{where}: {self._column!r} is null; {FILL_IN}")
            self._skipped.add(where, self._column)

    def _values(self) -> Iterator[Any]:
        for batch in self._dataset.select_columns([self._column]).iter(batch_size=1000):
            yield from batch[self._column]


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
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScoreModeError(
            f"dataset {name!r} cannot be loaded: {text} (check dataset, config and split)"
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
def offline_if_unreachable(dataset: str) -> Iterator[None]:
    """Switch the hub libraries to offline mode where the hub does not answer.

    Without this a machine without network waits through minutes of retries before the local cache
    is looked into.
    """
    import datasets
    import huggingface_hub

    constants = huggingface_hub.constants
    if Path(dataset).exists() or constants.HF_HUB_OFFLINE or hub_reachable(constants.ENDPOINT):
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_reachable(endpoint: str) -> bool:
    """Whether anybody answers at the hub's address, within seconds."""
    import urllib.error
    import urllib.request

    try:
        request = urllib.request.Request(endpoint, method="HEAD")
        with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True  # somebody answered
    except (OSError, ValueError):
        return False
