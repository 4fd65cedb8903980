"""Plain text, compressed or not, whatever its name says; and what is no text, by its own name."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import shutil
import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_data_rows import COMPRESSIONS, FORMATS
from vllm.score.data import file_source, stdin_source
from vllm.score.errors import ScoreModeError

TEXT = "Größe 漢字 😀\r\n" * 5_000


def read(path: Path) -> str:
    return "".join(text for _, text in file_source(path).pieces())


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_text_by_any_name(tmp_path: Path, compression: str) -> None:
    data = COMPRESSIONS[compression](TEXT.encode())
    for name in (f"a.txt{compression}", "a.txt", "a", "a.md.gz", "x[1]" + compression):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == TEXT
    (source,) = {text for _, text in stdin_source(io.BytesIO(data)).pieces() if text}
    assert source == TEXT


def test_files_of_several_parts(tmp_path: Path) -> None:
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"size"  # as pzstd writes
    for name, data in (
        ("a.gz", gzip.compress(b"one ") + gzip.compress(b"two")),
        ("a.bz2", COMPRESSIONS[".bz2"](b"one ") + COMPRESSIONS[".bz2"](b"two")),
        ("a.xz", lzma.compress(b"one ") + lzma.compress(b"two")),
        ("a.zst", COMPRESSIONS[".zst"](b"one ") + skippable + COMPRESSIONS[".zst"](b"two")),
        ("b.zst", skippable + COMPRESSIONS[".zst"](b"one two")),
        ("a.lz4", COMPRESSIONS[".lz4"](b"one ") + COMPRESSIONS[".lz4"](b"two")),
    ):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == "one two", name


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_text(
    tmp_path: Path, ending: str, compression: str
) -> None:
    content = FORMATS[ending](["text"], "text") if ending in FORMATS else b"text"
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(COMPRESSIONS[compression](b"\xef\xbb\xbf" + content))
    assert read(path) == "text"


def test_a_byte_order_mark_on_standard_input() -> None:
    source = stdin_source(io.BytesIO(b"\xef\xbb\xbftext"))
    assert "".join(text for _, text in source.pieces()) == "text"


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "text")
    return file.getvalue()


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue()


def _arrow(stream: bool) -> bytes:
    file, table = io.BytesIO(), pa.table({"text": ["a"]})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


OTHERS = {
    "a zip archive": _zip(),
    "a tar archive": _tar(),
    "a Parquet file": _parquet(),
    "an Arrow file": _arrow(stream=False),
    "an Arrow  file": _arrow(stream=True),
    "a GGUF model": b"GGUF\3\0\0\0" + bytes(8),
    "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
    "compressed by lzma": lzma.compress(b"text", lzma.FORMAT_ALONE),
    "compressed twice": gzip.compress(COMPRESSIONS[".zst"](b"text")),
    "text in UTF-32": "text".encode("utf-32"),
    "text in UTF-16": "text, text".encode("utf-16"),
    "text in UTF-16; convert it, e.g. with iconv -f UTF-16LE": "text, text".encode("utf-16-le"),
    "text in UTF-16; convert it, e.g. with iconv -f UTF-16BE": "text, text".encode("utf-16-be"),
}


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".txt.gz"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_text_is_named(tmp_path: Path, kind: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(OTHERS[kind])
    with pytest.raises(ScoreModeError) as raised:
        read(path)
    message = str(raised.value).replace(", no text in UTF-8", "")
    assert f"is {' '.join(kind.split())}" in message and "; " in message
    path.write_bytes(gzip.compress(OTHERS[kind]))
    with pytest.raises(ScoreModeError, match=r"decompressed by gzip|compressed twice"):
        read(path)


@pytest.mark.parametrize("begin", ["GGUF is", "PAR1\n", "BZh9", "PK", "Rar!", "LZIP", "]"])
def test_texts_that_begin_like_something_else(tmp_path: Path, begin: str) -> None:
    content = f"{begin} a text".ljust(257) + "ustar is a format"
    (tmp_path / "a.txt").write_text(content)
    assert read(tmp_path / "a.txt") == content


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "latin-1"])
def test_the_command_that_is_advised_mends_the_file(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("text é\n".encode(encoding))
    with pytest.raises(ScoreModeError) as raised:
        read(path)
    words = str(raised.value).partition("iconv")[2].split()
    command = ["iconv", *words[: words.index("UTF-8") + 1], path]
    path.write_bytes(subprocess.run(command, capture_output=True, check=True).stdout)
    assert read(path) == "text é\n"


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst", "lz4"])
def test_damaged_data_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.txt.{ending}"
    data = COMPRESSIONS[f".{ending}"](TEXT.encode())
    for damaged in (data[:-3], data[:40] + b"\0\0\0\0" + data[44:], data + b"more"):
        path.write_bytes(damaged)
        with pytest.raises(ScoreModeError, match=r"cannot be decompressed by .*, make it anew"):
            read(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScoreModeError, match=r"'.*x\*.txt' does not exist \(a pattern is expanded"):
        file_source(tmp_path / "x*.txt")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ScoreModeError, match=r"is no regular file, .* write it to disk first"):
        file_source(tmp_path / "pipe")
