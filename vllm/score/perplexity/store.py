"""Scores on disk, group by group, so that a killed run goes on where it stopped.

A store is a directory:

    manifest.json              what was scored, with what: the fingerprint
    PLAN/000000.parquet ...    one part a group of windows, one row a scored token

A part is written under another name, synchronised and renamed, so it is there entirely or not at
all, whenever the process is killed. Each carries the digest of its prompts. The manifest's
fingerprint has to agree before anything is read or added.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
UNKNOWN = "unknown"  # in a fingerprint: agrees with every value
_MANIFEST = "manifest.json"
_LOCK = "lock"
_DIGEST = b"vllm_score.digest"


def part_schema() -> pa.Schema:
    """One row a scored token: its window, its position in the text, id, characters, nats."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("position", pa.int64(), nullable=False),
            pa.field("token_id", pa.int64(), nullable=False),
            pa.field("text", pa.string()),
            pa.field("logprob", pa.float32(), nullable=False),
            pa.field("window", pa.int64(), nullable=False),
        ]
    )


class Store:
    """Use `Store.open` or `Store.temporary`."""

    def __init__(self, directory: Path, *, durable: bool) -> None:
        self.directory = directory
        self._durable = durable
        self._lock: Any = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def temporary(cls) -> Store:
        """A store that is deleted with the object."""
        folder = tempfile.TemporaryDirectory(prefix="vllm-score-")
        store = cls(Path(folder.name), durable=False)
        store._temporary = folder
        return store

    @classmethod
    def open(cls, directory: str | Path, fingerprint: Mapping[str, Any], *, resume: bool) -> Store:
        """Open a directory for a run.

        Args:
            directory: made where it does not exist.
            fingerprint: all that the scores depend on, as nested plain values; `UNKNOWN` for what
                cannot be known beforehand.
            resume: go on with what the directory holds; an empty one is begun.

        Raises:
            ScoreModeError: the directory holds a run and resume is False; it holds something else;
                it holds a run of another fingerprint (the message says what changed); another
                process is using it.
        """
        store = cls(Path(directory), durable=True)
        store.directory.mkdir(parents=True, exist_ok=True)
        store._acquire()
        manifest = store.directory / _MANIFEST
        contents = {path.name for path in store.directory.iterdir()} - {_LOCK}
        if manifest.exists():
            if not resume:
                raise ScoreModeError(
                    f"store {str(directory)!r} already holds a run; pass resume=True (--resume) to "
                    "go on with it, or name another directory"
                )
            store._check(json.loads(manifest.read_text("utf-8")), fingerprint)
        elif any(not name.endswith(".tmp") for name in contents):
            raise ScoreModeError(
                f"store {str(directory)!r} is not empty, and no run was begun there; name an empty "
                "or a new directory"
            )
        else:
            text = json.dumps({"format": FORMAT, "fingerprint": fingerprint}, indent=2)
            store._write_file(manifest, text.encode("utf-8"))
        for leftover in store.directory.rglob("*.tmp"):
            leftover.unlink()
        return store

    def read(self, plan: str, group: int, digest: str) -> pa.Table | None:
        """A stored part; None if there is none.

        Args:
            plan: key of the plan.
            group: number of the group of windows.
            digest: of the prompts that the group has now.

        Raises:
            ScoreModeError: the stored part has other prompts, or is damaged.
        """
        import pyarrow as pa

        path = self._part(plan, group)
        if not path.exists():
            return None
        try:
            table = _read_part(path)
        except (pa.ArrowException, OSError) as error:
            raise ScoreModeError(
                f"store: {path} cannot be read ({error}); delete this file to have it scored again"
            ) from error
        stored = (table.schema.metadata or {}).get(_DIGEST, b"").decode()
        if stored != digest:
            raise ScoreModeError(
                f"text changed since the stored run: the prompts of group {group} have the digest "
                f"{digest[:12]}, those stored in {path} had {stored[:12] or 'none'}; restore the "
                "text, or name another directory"
            )
        return table.replace_schema_metadata(None)

    def write(self, plan: str, group: int, digest: str, table: pa.Table) -> None:
        """Store a part for good: when this returns, it survives a crash."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata({_DIGEST: digest.encode()}),
            sink,
            write_page_checksum=True,
        )
        path = self._part(plan, group)
        if not path.parent.exists():
            path.parent.mkdir()
            self._synchronise(self.directory)
        self._write_file(path, sink.getvalue())

    def parts(self, plan: str) -> Iterator[pa.Table]:
        """All stored parts of a plan, in order."""
        for path in sorted((self.directory / plan).glob("*.parquet")):
            yield _read_part(path).replace_schema_metadata(None)

    def check_groups(self, plan: str, count: int) -> None:
        """Raise ScoreModeError where more than `count` groups of a plan are stored."""
        stored = sum(1 for _ in (self.directory / plan).glob("*.parquet"))
        if stored > count:
            raise ScoreModeError(
                f"text changed since the stored run: it has {count} groups of windows now, "
                f"{self.directory / plan} has {stored}; restore the text, or name another directory"
            )

    def close(self) -> None:
        """Let another process use the directory. What is stored can still be read."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _part(self, plan: str, group: int) -> Path:
        return self.directory / plan / f"{group:06d}.parquet"

    def _check(self, manifest: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
        if manifest.get("format") != FORMAT:
            raise ScoreModeError(
                f"store {str(self.directory)!r} has format {manifest.get('format')!r}, this "
                f"version reads {FORMAT}; name another directory"
            )
        # Through JSON, as the stored one went: tuples become lists, keys strings.
        now = json.loads(json.dumps(fingerprint))
        changes = differences(manifest["fingerprint"], now)
        if changes:
            raise ScoreModeError(
                f"cannot resume from store {str(self.directory)!r}: "
                + "; ".join(changes)
                + ". Restore this, or name another directory"
            )

    def _acquire(self) -> None:
        import fcntl

        self._lock = open(self.directory / _LOCK, "w")  # noqa: SIM115 (held while the store is)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ScoreModeError(
                f"store {str(self.directory)!r} is in use by another process; wait for it, or name "
                "another directory"
            ) from None

    def _write_file(self, path: Path, data: Any) -> None:
        partial = path.with_name(path.name + ".tmp")
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        partial.rename(path)
        self._synchronise(path.parent)

    def _synchronise(self, directory: Path) -> None:
        if not self._durable:
            return
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_part(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    # A file object: of a name such as "run:1" pyarrow makes an address.
    with path.open("rb") as file:
        return pq.read_table(file, page_checksum_verification=True)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """What changed between two nested values, as "name was A, is now B"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [
            change
            for key in keys
            for change in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    if old == new or UNKNOWN in (old, new):
        return []
    return [f"{name} was {old!r}, is now {new!r}"]
