"""Sources of text: each kind of file gives the documents that were written to it."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.data import Source, TokenIdsSource, as_source, file_source, hub_source, stdin_source
from vllm.score.data.streams import atomic_write, decode_utf8
from vllm.score.data.tables import offline_if_unreachable
from vllm.score.errors import ScoreModeError

DOCUMENTS = ["hello\nworld", "", "NA", "12", 'é漢😀 "quoted", x', " = Title = \n"]


@pytest.fixture(autouse=True)
def quiet() -> None:
    datasets.disable_progress_bars()


def texts(source: Source) -> list[str]:
    """The documents, put together from their pieces."""
    found: dict[int, str] = {}
    for document, text in source.pieces():
        assert document in (len(found) - 1, len(found)), "documents follow one another"
        found[document] = found.get(document, "") + text
    return list(found.values())


def sha256(source: Source) -> str | None:
    source.check()
    return source.content_sha256()


def write_jsonl(path: Path, column: str = "text") -> Path:
    lines = [json.dumps({"n": 1, column: text}, ensure_ascii=False) for text in DOCUMENTS]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_csv(path: Path, column: str = "text") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["n", column])
        writer.writerows([number, text] for number, text in enumerate(DOCUMENTS))
    return path


def write_parquet(path: Path, column: str = "text") -> Path:
    pq.write_table(pa.table({"n": range(len(DOCUMENTS)), column: DOCUMENTS}), path)
    return path


def write_gzip(path: Path, column: str = "text") -> Path:
    path.write_bytes(gzip.compress(write_jsonl(path.with_suffix(""), column).read_bytes()))
    return path


WRITERS: dict[str, Callable[[Path, str], Path]] = {
    "a.jsonl": write_jsonl,
    "a.csv": write_csv,
    "a.tsv": write_csv,
    "a.parquet": write_parquet,
    "a.jsonl.gz": write_gzip,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(tmp_path: Path, name: str) -> None:
    source = file_source(WRITERS[name](tmp_path / name, "text"))
    assert texts(source) == DOCUMENTS
    assert texts(source) == DOCUMENTS  # again


@pytest.mark.parametrize("name", WRITERS)
def test_another_text_column(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, "body")
    assert texts(file_source(path, text_column="body")) == DOCUMENTS
    with pytest.raises(ScoreModeError, match=r"column 'text' is not in .* are '(n|body)', '"):
        texts(file_source(path))


def test_several_files(tmp_path: Path) -> None:
    one, two = write_jsonl(tmp_path / "1.jsonl"), write_jsonl(tmp_path / "2.jsonl")
    assert texts(file_source([one, two])) == DOCUMENTS * 2
    three = write_csv(tmp_path / "3.csv")
    assert texts(file_source([one, three])) == DOCUMENTS * 2
    (tmp_path / "4.txt").write_text("a")
    with pytest.raises(ScoreModeError, match="of different kinds"):
        file_source([one, tmp_path / "4.txt"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl', line 2 is not JSON"),
        ('{"text": 3}\n', r"row 1: 'text' is 3 \(int\), not text"),
        ('{"text": "a"}\n\n{"text": null}\n', r"row 2 \(line 3\): 'text' is null; fill it in"),
        ('{"text": "a"}\n{"body": "b"}\n', r"row 2: 'text' is missing \(it has 'body'\)"),
        ("", r"a\.jsonl' is empty"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ScoreModeError, match=message):
        texts(file_source(path))


def test_plain_text_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    content = "one\ufeff\r\n\r\ntwo é\n".encode()
    path.write_bytes(content)
    source = file_source(path)
    assert "".join(texts(source)).encode() == content
    assert source.size_bytes() == len(content)  # by the size of the file
    same = tmp_path / "b.md"
    same.write_bytes(content)
    assert sha256(file_source(same)) == sha256(source)
    same.write_bytes(content + b".")
    assert sha256(file_source(same)) != sha256(source)


@given(st.text(), st.integers(1, 7))
def test_utf8_is_decoded_across_reads(text: str, size: int) -> None:
    class Slow(io.BytesIO):
        def read(self, _: int | None = -1) -> bytes:
            return super().read(size)

    for mark in ("", "\ufeff"):
        pieces = decode_utf8(Slow((mark + text).encode()), "x")
        assert "".join(pieces) == (text if mark else text.removeprefix("\ufeff"))


@pytest.mark.parametrize("position", [0, 5, (1 << 20) - 1, (1 << 20) + 3])
def test_bytes_that_are_not_utf8(tmp_path: Path, position: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * position + b"\xff" + b"y" * 10)
    with pytest.raises(ScoreModeError, match=rf"a\.txt: byte {position} is not UTF-8 .* iconv"):
        texts(file_source(path))
    path.write_bytes("xé".encode()[:-1])
    with pytest.raises(ScoreModeError, match="byte 1 is not UTF-8"):
        texts(file_source(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ScoreModeError, match=r"nowhere\.txt' does not exist"):
        file_source(tmp_path / "nowhere.txt")
    with pytest.raises(ScoreModeError, match="is a directory"):
        file_source(tmp_path)
    with pytest.raises(ScoreModeError, match="no file is named"):
        file_source([])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ScoreModeError, match="plain text file and has no columns"):
        file_source(tmp_path / "a.txt", text_column="text")


def test_standard_input_can_be_read_again() -> None:
    source = stdin_source(io.BytesIO("abc é\n".encode()))
    assert texts(source) == ["abc é\n"]
    assert texts(source) == ["abc é\n"]
    with pytest.raises(ScoreModeError, match="standard input: byte 1 is not UTF-8"):
        texts(stdin_source(io.BytesIO(b"a\xff")))


def test_an_iterable_is_read_once_and_only_as_far_as_needed() -> None:
    read = []

    def documents() -> Any:
        for text in ("one", "two\nlines", "", "four"):
            read.append(text)
            yield text

    source = as_source(documents())
    first = source.pieces()
    assert next(first) == (0, "one")
    second = source.pieces()
    assert [next(second) for _ in range(2)] == [(0, "one"), (1, "two\nlines")]
    assert read == ["one", "two\nlines"]
    assert list(first) == [(1, "two\nlines"), (2, ""), (3, "four")]
    assert list(second) == [(2, ""), (3, "four")]
    assert texts(source) == ["one", "two\nlines", "", "four"] == read


@pytest.mark.parametrize("stream", [False, True])
def test_datasets(stream: bool) -> None:
    rows = datasets.Dataset.from_dict({"n": range(len(DOCUMENTS)), "text": DOCUMENTS})
    source = as_source(rows.to_iterable_dataset() if stream else rows)
    assert texts(source) == texts(source) == DOCUMENTS
    assert (sha256(source) is None) == stream
    with pytest.raises(ScoreModeError, match="column 'body' is not in dataset; its columns"):
        as_source(rows, text_column="body")


def test_hash_of_a_dataset_is_that_of_its_documents() -> None:
    def source(documents: list[str]) -> Source:
        return as_source(datasets.Dataset.from_dict({"text": documents}))

    assert sha256(source(DOCUMENTS)) == sha256(as_source(DOCUMENTS))
    assert sha256(source(["ab", "c"])) != sha256(source(["a", "bc"]))


def test_a_saved_dataset(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": DOCUMENTS})
    rows.save_to_disk(str(tmp_path / "one"))
    assert texts(hub_source(str(tmp_path / "one"))) == DOCUMENTS
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "dict"))
    assert texts(hub_source(str(tmp_path / "dict"), split="test")) == DOCUMENTS
    with pytest.raises(ScoreModeError, match=r"split 'train' is not in .* there are: 'test'"):
        hub_source(str(tmp_path / "dict"), split="train")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_folder(tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "test.jsonl")
    source = hub_source(str(tmp_path / "folder"), split="test", streaming=streaming)
    assert texts(source) == DOCUMENTS
    with pytest.raises(ScoreModeError, match=r"cannot be loaded: .*train.*check dataset, config"):
        hub_source(str(tmp_path / "folder"), split="train", streaming=streaming)


def test_a_hub_out_of_reach_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    # Nothing listens on port 9; without the probe this would go through half a minute of retries.
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    environment = dict(os.environ)
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ScoreModeError) as raised:
            hub_source("no-such-owner/no-such-dataset")
        message = str(raised.value)
        assert "no-such-dataset' is not on this machine and the Hugging Face Hub cannot" in message
        assert "pass a local file" in message and "\n" not in message
        assert huggingface_hub.constants.HF_HUB_OFFLINE is offline
        assert datasets.config.HF_HUB_OFFLINE is offline
        assert os.environ == environment


def test_within_child_processes_are_offline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with offline_if_unreachable("no-such-owner/no-such-model") as offline:
        assert offline and os.environ["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in os.environ
    with offline_if_unreachable(str(Path(__file__).parent)) as offline:  # a path: nobody is asked
        assert not offline and "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("place", ["d[1]", "f::g", "h*"])
def test_folders_that_datasets_takes_for_patterns_are_refused(tmp_path: Path, place: str) -> None:
    folder = tmp_path / place
    for name in (place, "d1", "hx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(json.dumps({"text": name}))
    with pytest.raises(ScoreModeError, match="for a pattern, not a name; rename it, or pass its"):
        hub_source(str(folder))
    assert texts(as_source(folder / "test.jsonl")) == [place]  # the remedy
    inner = tmp_path / "plain"
    inner.mkdir()
    (folder / "test.jsonl").rename(inner / f"test{place}.jsonl")
    with pytest.raises(ScoreModeError, match="for a pattern, not a name"):
        hub_source(str(inner))


def test_rows_without_a_text() -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", None, "", "b"]})
    for dataset in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ScoreModeError, match=r"dataset, row 2: 'text' is null; .*--skip-empty"):
            texts(as_source(dataset))
        source = as_source(dataset, skip_empty=True)
        assert texts(source) == texts(source) == ["a", "b"]
        (note,) = source.notes()
        assert note == "2 rows were skipped, without a value in 'text': the first is dataset, row 2"


def test_texts_and_their_hash() -> None:
    source = as_source("some é text")
    assert texts(source) == ["some é text"]
    assert sha256(source) == hashlib.sha256("some é text".encode()).hexdigest()
    assert source.size_bytes() == len("some é text".encode())
    assert texts(as_source(DOCUMENTS)) == DOCUMENTS
    assert as_source(source) is source


@pytest.mark.parametrize(
    ("value", "documents"),
    [
        ([1, 2, 3], [[1, 2, 3]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        ((1, np.int64(2)), [[1, 2]]),
        ([[1, 2], []], [[1, 2], []]),
        ([np.array([1, 2]), (3,)], [[1, 2], [3]]),
    ],
)
def test_token_ids(value: Any, documents: list[list[int]]) -> None:
    source = as_source(value)
    assert isinstance(source, TokenIdsSource)
    assert source.documents == documents
    with pytest.raises(ScoreModeError, match="no text"):
        source.pieces()


def test_a_path_is_a_file_and_a_str_never(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("content")
    assert texts(as_source(path)) == ["content"]
    assert texts(as_source(str(path))) == [str(path)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "source is empty"),
        (5, "source is int: give a text"),
        (b"bytes", "source is bytes"),
        ({"text": "a"}, "source is dict"),
        ([1, "a"], r"list of neither .* \(its types: int, str\)"),
        ([True, False], "list of neither"),
        (iter([1, 2]), "source is "),
    ],
)
def test_what_is_no_source(value: Any, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        as_source(value)


def test_a_file_is_written_entirely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(OSError, match="full"), atomic_write(path) as file:
        file.write(b"half")
        raise OSError("the disk is full")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"before")]
    with atomic_write(path, durable=True) as file:
        file.write(b"after")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.bin", b"after")]
