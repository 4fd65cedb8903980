"""Tables of every format and compression: what was written is read, and faults are named."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.data import file_source
from vllm.score.data.rows import Columns, read_rows
from vllm.score.errors import ScoreModeError

DOCUMENTS = ["hello\nworld", "NA", "12", 'é漢😀 "quoted", x', "2024-01-01", " = Title = \n"]


def _csv(texts: list[str], column: str, delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["n", column])
    writer.writerows(enumerate(texts))
    return file.getvalue().encode()


def _parquet(texts: list[str], column: str) -> bytes:
    file = io.BytesIO()
    table = pa.table({"n": range(len(texts)), column: pa.array(texts, pa.string())})
    pq.write_table(table, file, row_group_size=3)
    return file.getvalue()


FORMATS: dict[str, Callable[[list[str], str], bytes]] = {
    ".jsonl": lambda texts, column: "".join(
        json.dumps({"n": 1, column: text}, ensure_ascii=False) + "\n" for text in texts
    ).encode(),
    ".json": lambda texts, column: json.dumps([{"n": 1, column: t} for t in texts]).encode(),
    ".csv": lambda texts, column: _csv(texts, column, ","),
    ".tsv": lambda texts, column: _csv(texts, column, "\t"),
    ".parquet": _parquet,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".lz4": lambda data: pa.compress(data, codec="lz4", asbytes=True),
}


def texts(path: Path | list[Path], **options: Any) -> list[str]:
    found: dict[int, str] = {}
    for document, text in file_source(path, **options).pieces():
        found[document] = found.get(document, "") + text
    return list(found.values())


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", FORMATS)
@settings(max_examples=15, deadline=None)
@given(documents=st.lists(st.text(st.characters(codec="utf-8")), min_size=1))
def test_what_was_written_is_read(ending: str, compression: str, documents: list[str]) -> None:
    data = COMPRESSIONS[compression](FORMATS[ending](documents, "text"))
    with tempfile.TemporaryDirectory() as folder:
        # Beside it, what its name would be as a pattern.
        (Path(folder) / f"x1{ending}{compression}").write_bytes(data[:0])
        path = Path(folder) / f"x[1]{ending}{compression}"
        path.write_bytes(data)
        source = file_source(path)
        assert source.content_sha256() is None
        source.check()
        assert [text for _, text in source.pieces()] == documents
        digest = hashlib.sha256(b"\xff".join(text.encode() for text in documents)).hexdigest()
        assert source.content_sha256() == digest
        assert source.size_bytes() == sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize(
    "name", ["x[1]", "x?", "x*", "a::b", "s3:x", "file:x", "~", "{a,b}", "%41"]
)
@pytest.mark.parametrize("ending", [*FORMATS, ".txt"])
def test_names_are_taken_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for other in ("x1", "xy", "a", "b", name):
        write = FORMATS.get(ending, lambda texts, _: texts[0].encode())
        Path(other + ending).write_bytes(write([f"text of {other}"], "text"))
    assert texts(Path(name + ending)) == [f"text of {name}"]


@pytest.mark.parametrize("ending", FORMATS)
def test_only_the_wanted_column_is_read(tmp_path: Path, ending: str) -> None:
    shards = []
    for number, other in enumerate((1, "one", None, [1, 2])):
        rows = [{"text": text, "other": other} for text in ("2024-01-01", "2024-01-02")]
        path = tmp_path / f"{number}{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif ending in (".csv", ".tsv"):
            lines = [f"{row['text']}{',' if ending == '.csv' else chr(9)}{other!r}" for row in rows]
            header = lines[0].replace(rows[0]["text"], "text").replace(repr(other), "other")
            path.write_text("\n".join([header, *[line.replace("[1, 2]", "x") for line in lines]]))
        else:
            path.write_text(
                json.dumps(rows) if ending == ".json" else "\n".join(map(json.dumps, rows))
            )
        shards.append(path)
    assert texts(shards) == ["2024-01-01", "2024-01-02"] * 4


def test_a_text_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [date(2024, 1, 1)]}), tmp_path / "a.parquet")
    with pytest.raises(ScoreModeError, match=r"row 1: 'text' is .*\(date\), not text; name the"):
        texts(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("mark", [False, True])
def test_tables_without_rows(tmp_path: Path, ending: str, mark: bool) -> None:
    (tmp_path / f"none{ending}").write_bytes(
        (b"\xef\xbb\xbf" if mark and ending != ".parquet" else b"")
        + (FORMATS[ending]([], "text") or b"\n")
    )
    with pytest.raises(ScoreModeError, match=r"none\..*' has no rows; name a file with a text"):
        texts(tmp_path / f"none{ending}")
    (tmp_path / f"some{ending}").write_bytes(FORMATS[ending](DOCUMENTS, "text"))
    assert texts([tmp_path / f"none{ending}", tmp_path / f"some{ending}"]) == DOCUMENTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "n,text\n1,a\n2,b,c\n", r"a\.csv', line 3 has 3 fields, the header has 2; put"),
        ("a.tsv", "n\ttext\n1\ta\tb\n", r"line 2 has 3 fields, .* holds a '\\t' into double"),
        (
            "a.csv",
            'text\n"a\nb"\n\n"c\nd\n',
            r"row at line 5 .*: a quote is opened .* never closed",
        ),
        ("a.csv", 'text\n"a" b\n', r"row at line 2 cannot be read: ',' expected after '\"'; put"),
        ("a.csv", "text,n,text\na,1,b\n", "'text' is in .* more than once; its columns are 'text'"),
        ("a.csv", "body\na\n", "column 'text' is not in .*; its columns are 'body'; name the col"),
        ("a.csv", 'n,text\n1,"a\nb"\n2\n', r"row 2 \(line 4\): 'text' is missing \(it has 'n'\)"),
        ("a.csv", b"n,text\n1,a\n2,\xe9\n", r"line 3: byte 2 of the line is not UTF-8 .*iconv"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', "line 2 is not JSON: .* at character 13; give"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n',
            r"line 2: byte 10 of the line is not UTF",
        ),
        ("a.jsonl", '[{"text": "a"}]', r"line 1 is \[{'text': 'a'}\]; give an object per line"),
        (
            "a.jsonl",
            '{"text": "a", "n": ' + "9" * 5000 + "}",
            "line 1 is not JSON: Exceeds the lim",
        ),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not JSON: .* recursion depth"),
        ("a.json", '[{"text": "a"}, 3]', "item 2 is 3; give an object per item"),
        ("a.json", '[{"text": "a"}', "a.json' is not JSON: .* at character 15; give"),
        ("a.json", '{"text": "a"}\n3', "line 2 is 3; give an object per line"),
        ("a.parquet", "text", "cannot be read as Parquet: .*; it is damaged or of another kind"),
    ],
)
def test_faults_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ScoreModeError, match=message):
        texts(path)


def test_a_column_twice_in_parquet(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "n", "n"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a"]
    with pytest.raises(ScoreModeError, match=r"'n' is in .* more than once"):
        texts(tmp_path / "a.parquet", text_column="n")


def test_json_is_a_list_or_lines(tmp_path: Path) -> None:
    rows = [{"text": text} for text in DOCUMENTS]
    for number, content in enumerate(
        (
            json.dumps(rows),
            "\ufeff \n" + json.dumps(rows, indent=2),
            "\n".join(map(json.dumps, rows)),
        )
    ):
        path = tmp_path / f"{number}.json"
        path.write_text(content, encoding="utf-8")
        assert texts(path) == DOCUMENTS


def test_fields_may_be_long_and_lines_end_as_they_like(tmp_path: Path) -> None:
    long = "ab,\n" * 100_000
    (tmp_path / "long.csv").write_bytes(f'text\r\n"{long}"\r\nNA\r\n""\r\n'.encode())
    limit = csv.field_size_limit()
    assert texts(tmp_path / "long.csv") == [long, "NA", ""]
    assert csv.field_size_limit() == limit
    (tmp_path / "mac.csv").write_bytes(b"n,text\r1,a\r\r2,b")
    assert texts(tmp_path / "mac.csv") == ["a", "b"]


@pytest.mark.parametrize("ending", FORMATS)
def test_rows_without_a_text_are_skipped_and_counted(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(FORMATS[ending](["a", "", "b", ""], "text"))
    assert texts(path) == ["a", "", "b", ""]
    source = file_source(path, skip_empty=True)
    for _ in range(2):
        assert [text for _, text in source.pieces()] == ["a", "b"]
        (note,) = source.notes()
        assert note.startswith("2 rows were skipped, without a value in 'text': the first is file")
        assert "row 2" in note
    path.write_bytes(FORMATS[ending](["", ""], "text"))
    with pytest.raises(ScoreModeError, match="has no row with a value in 'text'"):
        texts(path, skip_empty=True)


def test_null_and_missing_fields_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n{"text": null}\n{"text": "a"}\n')
    assert texts(path, skip_empty=True) == ["a"]
    path.write_text('{"n": 1}\n')
    with pytest.raises(ScoreModeError, match=r"column 'text' is not in .*; its columns are 'n'"):
        texts(path, skip_empty=True)


def _late(fault: bytes, ending: str) -> bytes:
    return FORMATS[ending](["text"] * 20_000, "text") + fault


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"x" * 3_000_000 + b"\xff", "byte 3000000 is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 3_000_000 + b"\xff"), "byte 3000000 is not UTF-8"),
        ("a.txt.gz", gzip.compress(os.urandom(2 << 20).hex().encode())[:-9], "incomplete or dam"),
        ("a.jsonl", _late(b'{"text": null}\n', ".jsonl"), "row 20001: 'text' is null"),
        ("a.jsonl", _late(b'{"text": ', ".jsonl"), "line 20001 is not JSON"),
        ("a.jsonl", _late(b'{"text": "\\ud800"}\n', ".jsonl"), "lone surrogate"),
        ("a.csv", _late(b"1,2,3\n", ".csv"), "line 20002 has 3 fields"),
    ],
)
def test_a_fault_at_the_end_is_found_beforehand(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    source = file_source(tmp_path / name)
    assert next(text for _, text in source.pieces() if text)  # the beginning is all right
    with pytest.raises(ScoreModeError, match=message):
        source.check()


def test_a_file_that_changes_is_checked_and_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    source = file_source(path)
    source.check()
    before = source.content_sha256()
    path.write_text("other")
    source.check()
    assert source.content_sha256() != before
    path.write_bytes(b"other\xff")
    with pytest.raises(ScoreModeError, match="byte 5 is not UTF-8"):
        source.check()


def test_rows_come_before_the_file_has_been_read(tmp_path: Path) -> None:
    for ending in (".jsonl", ".csv", ".parquet"):
        path = tmp_path / f"a{ending}"
        path.write_bytes(FORMATS[ending](DOCUMENTS, "text"))
        row = next(read_rows([path], Columns(("text",), ("n", "m")), "texts"))
        assert row.fields["text"] == DOCUMENTS[0] and str(row.fields["n"]) in "01"
        assert row.number == 1 and list(row.columns) == ["n", "text"]
    path = tmp_path / "b.jsonl"
    path.write_bytes(_late(b"no JSON", ".jsonl"))
    assert next(read_rows([path], Columns(("text",)), "texts")).fields == {"text": "text"}
