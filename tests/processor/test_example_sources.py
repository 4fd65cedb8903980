"""GSM8K from copies of its files, and rows of local files that need care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.processor.example_sources import Example, Gsm8kR1Template, local_file

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""


def copy(folder: Path, columns: dict[str, list[Any]]) -> Path:
    """A folder as the hub has it: a card that names configurations, and Parquet files."""
    for config, split in (("main", "train"), ("main", "test"), ("socratic", "train")):
        (folder / config).mkdir(exist_ok=True)
        file = folder / config / f"{split}-00000-of-00001.parquet"
        pq.write_table(
            pa.table({n: [f"{config} {split} {v}" for v in c] for n, c in columns.items()}), file
        )
    (folder / "README.md").write_text(CARD)
    return folder


def test_configurations_and_slices(tmp_path: Path) -> None:
    folder = copy(
        tmp_path, {"question": ["a?", "b?"], "answer": ["#### 1,234,567", "x\n####\n-2 "]}
    )
    short = Gsm8kR1Template(path=str(folder), template="<{question}>")
    assert short(split="test") == [
        Example("<main test a?>", "1234567"),
        Example("<main test b?>", "-2"),
    ]
    assert short("train[1:]") == [Example("<main train b?>", "-2")]
    other = Gsm8kR1Template(path=str(folder), config="socratic", template="{question}")
    assert [example.question for example in other()] == ["socratic train a?", "socratic train b?"]
    for wrong in (
        lambda: other("test"),
        lambda: Gsm8kR1Template(path=str(folder), config="maine")(),
        lambda: Gsm8kR1Template(path=str(folder / "nowhere"))(),
    ):
        with pytest.raises(ScoreModeError, match=r"cannot be loaded: .* register a local copy"):
            wrong()


def test_copies_that_are_something_else(tmp_path: Path) -> None:
    folder = copy(tmp_path, {"question": ["a?"], "answer": ["two"]})
    with pytest.raises(ScoreModeError, match=r"row 1: the answer 'main train two' has no ####"):
        Gsm8kR1Template(path=str(folder))()
    (tmp_path / "other").mkdir()
    folder = copy(tmp_path / "other", {"prompt": ["a?"], "answer": ["#### 2"]})
    with pytest.raises(
        ScoreModeError, match="no column 'question'; its columns are prompt, answer"
    ):
        Gsm8kR1Template(path=str(folder))()


def test_answers_that_are_numbers_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": "a", "gold": 12}, {"q": "b", "gold": None}, {"q": "c", "gold": 7}]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = local_file(path=path, question="q", answer="gold")
    assert found == [Example("a", "12"), Example("b", None), Example("c", "7")]
    table = tmp_path / "rows.csv"
    table.write_text('q,gold\n007,0.50\n"1,5\n""x""",\n')
    found = local_file(path=table, question="q", answer="gold")
    assert found == [Example("007", "0.50"), Example('1,5\n"x"', None)]


def test_files_that_changed_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for answer in ("1", "2"):
        path.write_text(json.dumps({"question": "a", "answer": answer}))
        assert local_file(path=path) == [Example("a", answer)]


@pytest.mark.parametrize(
    ("content", "message"), [('{"question": ', "line 1 is not JSON"), ("", "has no rows")]
)
def test_files_that_cannot_be_read(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ScoreModeError, match=rf"rows\.jsonl'.* {message}"):
        local_file(path=path)


def test_names_are_taken_literally(tmp_path: Path) -> None:
    for name, question in (("q[1].jsonl", "meant"), ("q1.jsonl", "not meant")):
        (tmp_path / name).write_text(json.dumps({"question": question}))
    assert local_file(path=tmp_path / "q[1].jsonl", answer=None) == [Example("meant")]
    (tmp_path / "d[1]").mkdir()
    folder = copy(tmp_path / "d[1]", {"question": ["a?"], "answer": ["#### 2"]})
    with pytest.raises(ScoreModeError, match=r"takes '.*d\[1\]' for a pattern"):
        Gsm8kR1Template(path=str(folder))()
