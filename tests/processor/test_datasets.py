"""The data sets that prompts are drawn from, on files made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.processor import DATASET_REGISTRY, Example, register_dataset
from vllm.score.processor.datasets import Gsm8kR1Template, fill, local_file, sample

ROWS = {"question": ["1+1?", "2, or {3}?", "4?"], "answer": ["2", "NA", ""]}
WANT = [Example("1+1?", "2"), Example("2, or {3}?", "NA"), Example("4?", None)]


@pytest.fixture
def registry():
    before = dict(DATASET_REGISTRY)
    yield DATASET_REGISTRY
    DATASET_REGISTRY.clear()
    DATASET_REGISTRY.update(before)


def write(folder, kind):
    path = folder / f"rows.{kind}"
    table = pa.table(ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "csv":
        pyarrow.csv.write_csv(table, path)
    else:
        records = table.to_pylist()
        lines = "\n".join(map(json.dumps, records)) if kind == "jsonl" else json.dumps(records)
        path.write_text(lines)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_a_local_file_of_each_format(tmp_path, kind):
    path = write(tmp_path, kind)
    assert sample("local_file", "train", path=path) == WANT
    first = sample(
        "local_file", "train[:1]", path=str(path), answer=None, template="Q {question} A"
    )
    assert first == [Example("Q 1+1? A", None)]


def test_draws_are_without_replacement_and_repeatable(tmp_path):
    path = write(tmp_path, "jsonl")
    drawn = sample("local_file", "train", 3, seed=5, path=path)
    assert sorted(drawn, key=lambda e: e.question) == sorted(WANT, key=lambda e: e.question)
    assert drawn == sample("local_file", "train", 3, seed=5, path=path)
    orders = {tuple(sample("local_file", "train", 2, seed=s, path=path)) for s in range(12)}
    assert len(orders) > 1


def test_gsm8k_from_a_local_copy(tmp_path, registry):
    answers = ["He has 3 and 4.\n#### 7", "Much.\n#### 1,234"]
    table = pa.table({"question": ["How many?", "How much?"], "answer": answers})
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    copy = Gsm8kR1Template(path=str(tmp_path), config=None)
    register_dataset("gsm8k_r1_template", copy, replace=True)
    first, second = DATASET_REGISTRY["gsm8k_r1_template"](split="test")
    assert (first.answer, second.answer) == ("7", "1234")
    assert "How many?" in first.question and first.question.endswith("<think>")
    with pytest.raises(ScoreModeError, match="split 'train', cannot be loaded"):
        sample("gsm8k_r1_template", "train")


def test_ones_own_data_set(registry):
    register_dataset("mine", lambda split: [Example(split)])
    assert sample("mine", "dev") == [Example("dev")]
    with pytest.raises(ScoreModeError, match="there is a data set 'mine' already"):
        register_dataset("mine", lambda split: [])
    with pytest.raises(ScoreModeError, match="must be a function"):
        register_dataset("other", [Example("x")])
    register_dataset("empty", lambda split: [])
    with pytest.raises(ScoreModeError, match="has no example in split 'dev'"):
        sample("empty", "dev")
    with pytest.raises(ScoreModeError, match=r"num_prompts must be .* from 1 to 1 or None, got 2"):
        sample("mine", "dev", 2)
    with pytest.raises(ScoreModeError, match="the options path"):
        sample("mine", "dev", path="x")


def test_what_is_missing_is_named(tmp_path):
    path = write(tmp_path, "jsonl")
    with pytest.raises(ScoreModeError, match="did you mean 'gsm8k_r1_template'"):
        sample("gsm8k_r1_templat", "train")
    for options, message in (
        ({}, "missing a required argument: 'path'"),
        ({"path": tmp_path / "no.csv"}, "does not exist"),
        ({"path": tmp_path}, "is a directory"),
        ({"path": write(tmp_path, "csv").rename(tmp_path / "rows.txt")}, "is of no kind"),
        ({"path": path, "question": "q"}, "has no column 'q'; its columns are question, answer"),
        ({"path": path, "answer": "gold"}, "by answer= .answer=None for none"),
        ({"path": path, "template": "no place"}, "template must have"),
    ):
        with pytest.raises(ScoreModeError, match=message):
            sample("local_file", "train", **options)
    with pytest.raises(ScoreModeError, match='its rows are the split "train"'):
        sample("local_file", "test", path=path)
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"question": 1}\n')
    with pytest.raises(ScoreModeError, match="row 1: 'question' is 1, not text"):
        sample("local_file", "train", path=numbers, answer=None)


def test_other_braces_of_a_template_stay():
    assert fill("{a} {question} {0}", "{b}") == "{a} {b} {0}"


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
