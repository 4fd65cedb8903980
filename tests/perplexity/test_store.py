"""The store: complete parts or none, and no run mixed with another."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from tests.perplexity.parts import FINGERPRINT, LARGE, NUMBERS, part
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.store import UNKNOWN, Store, differences


def test_parts_come_back_as_written(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "new" / "store", FINGERPRINT, resume=False)
    store.write("plan", 0, "abc", part(0))
    store.write("plan", 1, "def", part(3))
    assert store.read("plan", 0, "abc") == part(0)
    assert store.read("plan", 2, "abc") is None
    assert store.read("other", 0, "abc") is None
    assert pa.concat_tables(store.parts("plan")) == pa.concat_tables([part(0), part(3)])
    store.check_groups("plan", 2)
    store.close()
    again = Store.open(tmp_path / "new" / "store", FINGERPRINT, resume=True)
    assert again.read("plan", 1, "def") == part(3)


def test_a_part_of_other_prompts_is_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path, FINGERPRINT, resume=False)
    store.write("plan", 0, "abc", part())
    with pytest.raises(ScoreModeError, match=r"text changed .* group 0 .* digest xyz.* had abc"):
        store.read("plan", 0, "xyz")
    store.write("plan", 1, "def", part())
    with pytest.raises(ScoreModeError, match=r"text changed .* 1 groups of windows now"):
        store.check_groups("plan", 1)


def test_a_begun_run_is_not_begun_again(tmp_path: Path) -> None:
    Store.open(tmp_path, FINGERPRINT, resume=False).close()
    with pytest.raises(ScoreModeError, match="already holds a run; pass resume=True"):
        Store.open(tmp_path, FINGERPRINT, resume=False)


def test_resuming_nothing_begins(tmp_path: Path) -> None:
    Store.open(tmp_path, FINGERPRINT, resume=True).close()
    assert json.loads((tmp_path / "manifest.json").read_text())["fingerprint"]["text"] == UNKNOWN


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for resume in (False, True):
        with pytest.raises(ScoreModeError, match="not empty, and no run was begun there"):
            Store.open(tmp_path, FINGERPRINT, resume=resume)


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    Store.open(tmp_path, FINGERPRINT, resume=False).close()
    changed = {**FINGERPRINT, "settings": {"stride": 8, "plan": (1, 2)}, "text": "known now"}
    with pytest.raises(ScoreModeError, match=r": settings\.stride was 4, is now 8\. Restore"):
        Store.open(tmp_path, changed, resume=True)
    Store.open(tmp_path, {**FINGERPRINT, "text": "known now"}, resume=True).close()


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}}) == []
    assert differences({"a": 1}, {"b": {"c": 2}}) == [
        "a was 1, is now None",
        "b was None, is now {'c': 2}",
    ]
    assert differences({"a": UNKNOWN}, {"a": 3}) == []


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = Store.open(tmp_path, FINGERPRINT, resume=False)
    with pytest.raises(ScoreModeError, match="in use by another process"):
        Store.open(tmp_path, FINGERPRINT, resume=True)
    store.close()
    Store.open(tmp_path, FINGERPRINT, resume=True).close()


def test_a_damaged_part_says_what_to_do(tmp_path: Path) -> None:
    store = Store.open(tmp_path, FINGERPRINT, resume=False)
    store.write("plan", 0, "abc", part(rows=1000))
    path = tmp_path / "plan" / "000000.parquet"
    content = bytearray(path.read_bytes())
    for bad in (content[: len(content) // 2], bytes(100)):
        path.write_bytes(bad)
        with pytest.raises(ScoreModeError, match=r"000000\.parquet cannot be read .*delete this"):
            store.read("plan", 0, "abc")
    content[len(content) // 8] ^= 0xFF  # in the data: only the checksum can tell
    path.write_bytes(content)
    with pytest.raises(ScoreModeError, match="cannot be read"):
        store.read("plan", 0, "abc")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path, FINGERPRINT, resume=False).close()
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(ScoreModeError, match="has format 99"):
        Store.open(tmp_path, FINGERPRINT, resume=True)


def test_a_temporary_store_goes_with_its_object() -> None:
    store = Store.temporary()
    store.write("plan", 0, "abc", part())
    directory = store.directory
    assert next(store.parts("plan")) == part()
    del store
    assert not directory.exists()


def test_killed_while_writing_leaves_whole_parts(tmp_path: Path) -> None:
    groups = 15
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.perplexity.parts", str(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert writer.stdout is not None
    for group in range(groups):
        assert writer.stdout.readline() == f"{group}\n".encode()
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    store = Store.open(tmp_path, FINGERPRINT, resume=True)  # the lock died with the process
    found = sorted((tmp_path / "plan").glob("*"))
    assert groups <= len(found) <= NUMBERS
    for path in found:
        assert path.suffix == ".parquet"
        number = int(path.stem)
        assert store.read("plan", number, str(number)) == part(number, rows=LARGE)
