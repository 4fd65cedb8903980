"""The data sets that prompts are drawn from, on files made on the spot."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.processor import DATASET_REGISTRY, Example, register_dataset
from vllm.score.processor.example_sources import Gsm8kR1Template, fill
from vllm.score.processor.examples import sample

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
        pyarrow.parquet.write_table(table, path)
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
    pyarrow.parquet.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
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
    with pytest.raises(ScoreModeError, match="2 examples are asked"):
        sample("mine", "dev", 2)
    with pytest.raises(ScoreModeError, match="the options path"):
        sample("mine", "dev", path="x")


def test_what_is_missing_is_named(tmp_path):
    path = write(tmp_path, "jsonl")
    with pytest.raises(ScoreModeError, match="did you mean 'gsm8k_r1_template'"):
        sample("gsm8k_r1_templat", "train")
    for options, message in (
        ({}, "needs path="),
        ({"path": tmp_path / "no.csv"}, "does not exist"),
        ({"path": tmp_path}, "is a directory"),
        ({"path": write(tmp_path, "csv").rename(tmp_path / "rows.txt")}, "is of no kind"),
        ({"path": path, "question": "q"}, "has no column 'q'; its columns are question, answer"),
        ({"path": path, "answer": "gold"}, "answer=None for none"),
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
