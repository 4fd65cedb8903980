"""Which questions a command reads, with their answers and choices."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.score.errors import ScoreModeError

READABLE = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class Questions:
    """Questions side by side.

    Attributes:
        given: texts, or lists of messages.
        names: what errors call them.
        gold: the right answers; None where it is not known.
        choices: candidate answers of each; empty where there are none.
    """

    given: Sequence[Any]
    names: Sequence[str]
    gold: Sequence[str | None]
    choices: Sequence[list[str]] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """The questions; messages as JSON."""
        return [q if isinstance(q, str) else json.dumps(q) for q in self.given]

    def token_ids(self, tokenizer: Any) -> list[list[int]]:
        """Of each question, with the tokenizer's special tokens or by its chat template.

        Raises:
            ScoreModeError: a question that cannot be used.
        """
        from vllm.score.sequence.contexts import context_token_ids

        found = []
        for question, name in zip(self.given, self.names, strict=True):
            ids = context_token_ids(question, tokenizer, name)
            if not ids:
                raise ScoreModeError(f"{name} has no tokens; give a question that is not empty")
            found.append(ids)
        return found


@dataclass(frozen=True)
class QuestionOptions:
    """The options that name questions, as given.

    Raises:
        ScoreModeError: on construction, for options that do not go together.
    """

    questions: Sequence[str]
    file: Path | None
    question_column: str | None
    answer_column: str | None
    choices_column: str | None
    chat: bool

    def __post_init__(self) -> None:
        if self.file is not None:
            if self.questions:
                raise ScoreModeError("--file and --question each name questions; give one of them")
            return
        for option, column in (
            ("--question-column", self.question_column),
            ("--answer-column", self.answer_column),
            ("--choices-column", self.choices_column),
        ):
            if column is not None:
                raise ScoreModeError(
                    f"{option} is {column!r}, but no file is named; add --file PATH"
                )

    @property
    def given(self) -> bool:
        return bool(self.questions) or self.file is not None

    def read(self) -> Questions:
        """The questions; of a file after reading it.

        Raises:
            ScoreModeError: none are named, or the file is not there or holds none.
        """
        if self.file is not None:
            found = self._of_file(self.file)
        elif self.questions:
            names = [f"--question {text[:30]!r}" for text in self.questions]
            found = Questions(list(self.questions), names, [None] * len(names))
        else:
            raise ScoreModeError(
                "a model is named and no question; give --question TEXT or --file PATH"
            )
        if not self.chat:
            return found
        given = [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in found.given]
        return Questions(given, found.names, found.gold, found.choices)

    def _of_file(self, path: Path) -> Questions:
        rows = read_rows(path)
        names = [f"{path}, row {number}" for number in range(1, len(rows) + 1)]

        def column(name: str) -> list[Any]:
            """Of every row; a row may leave it out unless none has it."""
            if not any(name in row for row in rows):
                columns = ", ".join(repr(each) for each in rows[0])
                raise ScoreModeError(
                    f"file {str(path)!r} has no column {name!r}; its columns are {columns}; name "
                    "another"
                )
            return [row.get(name) for row in rows]

        questions = column(self.question_column or QUESTION)
        for name, question in zip(names, questions, strict=True):
            if not question:
                raise ScoreModeError(f"{name}: the question is missing or empty")
        gold: list[str | None] = [None] * len(rows)
        if self.answer_column is not None or any(ANSWER in row for row in rows):
            answers = column(self.answer_column or ANSWER)
            gold = [None if answer in (None, "") else str(answer) for answer in answers]
        choices = []
        if self.choices_column is not None:
            choices = column(self.choices_column)
            for name, each in zip(names, choices, strict=True):
                if not isinstance(each, list) or not all(isinstance(c, str) for c in each):
                    raise ScoreModeError(
                        f"{name}: {self.choices_column!r} is {each!r:.60}; give a list of texts "
                        "(in .jsonl or .parquet)"
                    )
        return Questions(questions, names, gold, choices)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a table, at least one; of CSV all fields are texts.

    Raises:
        ScoreModeError: it is not there, or cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in READABLE:
        raise ScoreModeError(
            f"file {str(path)!r} is of no kind that holds questions; give one that ends in "
            f"{', '.join(READABLE)}"
        )
    if not path.is_file():
        raise ScoreModeError(f"file {str(path)!r} does not exist; name a file with questions")
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            rows = pq.read_table(path).to_pylist()
        elif suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                delimiter = "\t" if suffix == ".tsv" else ","
                rows = list(csv.DictReader(file, delimiter=delimiter, strict=True))
        else:
            rows = _json_lines(path)
    except ScoreModeError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and Unicode's are ValueErrors
        reason = " ".join(str(error).split())
        raise ScoreModeError(
            f"file {str(path)!r} cannot be read: {reason}; give a table as {suffix} has it"
        ) from error
    if not rows:
        raise ScoreModeError(f"file {str(path)!r} has no rows: there is nothing to ask")
    return rows


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ScoreModeError(
                f"file {str(path)!r}, line {number} is not JSON: {error}"
            ) from error
        if not isinstance(row, dict):
            raise ScoreModeError(
                f"file {str(path)!r}, line {number} is {row!r:.40}; give an object a line"
            )
        rows.append(row)
    return rows
