"""Files as streams of bytes: decompressed where they are compressed, named where they are no text.

What a file is, its first bytes say; its name may say something else. `atomic_write` writes one.
"""

from __future__ import annotations

import codecs
import io
import lzma
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vllm.score.errors import ScoreModeError, first_line

BOM = "\ufeff"
_BUFFER = 1 << 18
_READ = 1 << 20
_HEAD = 512  # a tar archive says what it is at byte 257
_ICONV = "convert it, e.g. with iconv -f {} -t UTF-8"
_UNPACK = "unpack it, and name the text in it"
_CODECS = (
    (re.compile(rb"\x1f\x8b\x08"), "gzip"),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), "bz2"),
    (re.compile(rb"\xfd7zXZ\0"), "xz"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd"),
    (re.compile(rb"\x04\x22\x4d\x18"), "lz4"),
    # Skippable frames, which pzstd and seekable zstd files begin with.
    (re.compile(rb"[\x50-\x5f]\x2a\x4d\x18"), "zstd"),
)
# What is no text in UTF-8: first bytes, name, what to do.
_KINDS = (
    (re.compile(rb"PK\x03\x04"), "a zip archive (as .docx and .xlsx are)", _UNPACK),
    (re.compile(rb".{257}ustar(\0|  \0)", re.S), "a tar archive", _UNPACK),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", _UNPACK),
    (re.compile(rb"Rar!\x1a\x07"), "a rar archive", _UNPACK),
    (re.compile(rb"\x1f[\x9d\xa0]"), "compressed by compress (.Z)", "unpack it with gzip -dc"),
    (re.compile(rb"LZIP\x01"), "compressed by lzip", "unpack it with lzip -dc"),
    (re.compile(rb"\x5d\0\0"), "compressed by lzma", "unpack it with xz -dc"),
    (re.compile(rb"\xff\x06\0\0sNaPpY"), "compressed by snappy", _UNPACK),
    (re.compile(rb"%PDF-"), "a PDF", "export its text, e.g. with pdftotext"),
    (re.compile(rb"\xd0\xcf\x11\xe0"), "an old Office document", "save it as text or CSV in UTF-8"),
    (re.compile(rb"PAR1\x15"), "a Parquet file", "give it a name that ends in .parquet"),
    (
        re.compile(rb"ARROW1\0\0|\xff{4}..\0\0", re.S),
        "an Arrow file",
        "pass the folder that Dataset.save_to_disk made (--dataset), or write it as Parquet",
    ),
    (re.compile(rb"GGUF.\0\0\0"), "a GGUF model", "name a text"),
    (re.compile(rb"SQLite format 3\0"), "an SQLite database", "export the table as CSV"),
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "text in UTF-32", _ICONV.format("UTF-32")),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "text in UTF-16", _ICONV.format("UTF-16")),
    # ASCII in UTF-16 without a byte-order mark is valid UTF-8, with a zero at every character.
    (re.compile(rb"([\t\r\n -~]\0){4}"), "text in UTF-16", _ICONV.format("UTF-16LE")),
    (re.compile(rb"(\0[\t\r\n -~]){4}"), "text in UTF-16", _ICONV.format("UTF-16BE")),
)


def check_file(path: Path, content: str) -> None:
    """Raise ScoreModeError where there is no such file.

    Args:
        content: what it should hold, for the error ("pairs").
    """
    if path.is_file():
        return
    if path.is_dir():
        raise ScoreModeError(f"file {str(path)!r} is a directory; name a file with {content}")
    if path.exists():
        raise ScoreModeError(
            f"file {str(path)!r} is no regular file, and is read more than once; write it to disk "
            f"first, and name the file with {content}"
        )
    literal = ""
    if is_pattern(str(path)):
        literal = " (a pattern is expanded by the shell, where it fits a file and is not quoted)"
    raise ScoreModeError(f"file {str(path)!r} does not exist{literal}; name a file with {content}")


def is_pattern(name: str) -> bool:
    """Whether libraries that expand patterns, or chain file systems, read `name` as such."""
    return any(mark in name for mark in ("*", "?", "[", "::"))


@contextmanager
def atomic_write(path: Path, *, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file to write, which is there entirely or not at all: it is written as PATH.tmp and renamed
    at the end; after an error nothing is left of it.

    Args:
        durable: when the context is left, the file survives a crash of the machine.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if durable:
        synchronise(path.parent)


def synchronise(directory: Path) -> None:
    """Names in the directory survive a crash of the machine."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_bytes(path: Path, *, text: bool = True) -> Iterator[io.BufferedReader]:
    """The content of a file, decompressed.

    Args:
        text: refuse what is no text.

    Raises:
        ScoreModeError: it cannot be opened, its compressed data is damaged, or it is no text.
    """
    name = f"file {str(path)!r}"
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise ScoreModeError(f"{name} cannot be opened: {error.strerror or error}") from error
    with file:

        def read(size: int) -> bytes:
            try:
                return file.read(size) or b""
            except OSError as error:
                raise ScoreModeError(f"{name} cannot be read: {error.strerror or error}") from error

        yield decompressed(read, name, text=text)


def decompressed(
    read: Callable[[int], bytes], name: str, *, text: bool = True
) -> io.BufferedReader:
    """What `read` gives, decompressed (gzip, bz2, xz, zstd, lz4).

    Args:
        read: at most so many bytes, none at the end.
        name: for errors.
        text: refuse what is no text.

    Raises:
        ScoreModeError: it is no text; also later, where compressed data is damaged.
    """
    stream: io.BufferedReader = io.BufferedReader(_Raw(read), _BUFFER)
    head = stream.peek(_HEAD)[:_HEAD]
    if (codec := _codec(head)) is not None:
        stream = io.BufferedReader(_Raw(_decompress(stream, codec, name)), _BUFFER)
        head = stream.peek(_HEAD)[:_HEAD]
        if _codec(head) is not None:
            raise ScoreModeError(
                f"{name} is compressed twice; decompress it once, and name the result"
            )
        name = f"{name}, decompressed by {codec},"
    for mark, kind, remedy in _KINDS if text else ():
        if mark.match(head):
            raise ScoreModeError(f"{name} is {kind}, no text in UTF-8; {remedy}")
    return stream


def is_compressed(path: Path) -> bool:
    """Whether `open_bytes` decompresses the file."""
    with path.open("rb") as file:
        return _codec(file.read(_HEAD)) is not None


def decode_utf8(stream: IO[bytes], name: str) -> Iterator[str]:
    """The text of a byte stream without its byte-order mark, in pieces, at least one (perhaps
    empty).

    Raises:
        ScoreModeError: for bytes that are not UTF-8, with their position.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    done, first = 0, True
    yield ""
    while True:
        data = stream.read(_READ)
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise ScoreModeError(
                f"{name}: byte {done - held + error.start} is not UTF-8 ({error.reason}); {CONVERT}"
            ) from None
        done += len(data)
        if text:
            yield text.removeprefix(BOM) if first else text
            first = False
        if not data:
            return


CONVERT = "convert the text, e.g. with iconv -f LATIN1 -t UTF-8 if it is in Latin-1"


class _Raw(io.RawIOBase):
    """`read(size)` as a stream, which fills every buffer as far as there is something."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer) and (data := self._read(len(buffer) - filled)):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled


def _decompress(stream: io.BufferedReader, codec: str, name: str) -> Callable[[int], bytes]:
    opened: Any
    if codec == "xz":
        opened = lzma.LZMAFile(stream)  # noqa: SIM115 (the stream's owner closes it)
    else:
        import pyarrow as pa

        opened = pa.CompressedInputStream(stream, codec)

    def read(size: int) -> bytes:
        try:
            return bytes(opened.read(size))
        except (OSError, EOFError, lzma.LZMAError) as error:  # pyarrow's are OSErrors
            raise ScoreModeError(
                f"{name} cannot be decompressed by {codec}: {first_line(error)}; it is incomplete "
                "or damaged, make it anew"
            ) from error

    return read


def _codec(head: bytes) -> str | None:
    return next((codec for mark, codec in _CODECS if mark.match(head)), None)
