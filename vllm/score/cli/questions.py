"""Which questions a command reads, with their answers and choices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm.score.cli.checks import check_no_file
from vllm.score.data.rows import Columns, Skipped, read_rows
from vllm.score.errors import ScoreModeError

QUESTION, ANSWER = "question", "answer"


@dataclass(frozen=True)
class Questions:
    """Questions side by side.

    Attributes:
        given: texts, or lists of messages.
        names: what errors call them.
        gold: the right answers; None where it is not known.
        choices: candidate answers of each; empty where there are none.
        notes: what the reader of the results should know of the files.
    """

    given: Sequence[Any]
    names: Sequence[str]
    gold: Sequence[str | None]
    choices: Sequence[list[str]] = field(default_factory=list)
    notes: Sequence[str] = ()

    @property
    def texts(self) -> list[str]:
        """The questions; messages as JSON."""
        return [q if isinstance(q, str) else json.dumps(q) for q in self.given]

    def token_ids(self, tokenizer: Any) -> list[list[int]]:
        """Of each question, with the tokenizer's special tokens or by its chat template.

        Raises:
            ScoreModeError: a question that cannot be used.
        """
        from vllm.score.tokens import encode_inputs

        found = [tokens.ids for tokens in encode_inputs(tokenizer, self.given, self.names)]
        for ids, name in zip(found, self.names, strict=True):
            if not ids:
                raise ScoreModeError(f"{name} has no tokens; give a question that is not empty")
        return found


@dataclass(frozen=True)
class QuestionOptions:
    """The options that name questions, as given.

    Raises:
        ScoreModeError: on construction, for options that do not go together.
    """

    questions: Sequence[str]
    files: Sequence[Path]
    question_column: str | None
    answer_column: str | None
    choices_column: str | None
    chat: bool
    skip_empty: bool = False

    def __post_init__(self) -> None:
        if self.files:
            if self.questions:
                raise ScoreModeError("--file and --question each name questions; give one of them")
            return
        check_no_file(
            question_column=self.question_column,
            answer_column=self.answer_column,
            choices_column=self.choices_column,
            skip_empty=self.skip_empty or None,
        )

    @property
    def given(self) -> bool:
        return bool(self.questions or self.files)

    def read(self) -> Questions:
        """The questions; of a file after reading it.

        Raises:
            ScoreModeError: none are named, or the file is not there or holds none.
        """
        if self.files:
            found = self._of_files()
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
        return replace(found, given=given)

    def _of_files(self) -> Questions:
        question = self.question_column or QUESTION
        answer = self.answer_column or ANSWER
        optional = (answer,) if self.choices_column is None else (answer, self.choices_column)
        columns = Columns((question,), optional, "name another with --question-column")
        skipped = Skipped((question,)) if self.skip_empty else None
        rows = list(read_rows(self.files, columns, "questions", skipped=skipped))
        names = [f"{row.path}, row {row.number}" for row in rows]

        def column(option: str, name: str) -> list[Any]:
            """Of every row; a row may leave it out unless none has it."""
            if not any(name in row.fields for row in rows):
                listed = ", ".join(repr(each) for each in rows[0].columns)
                raise ScoreModeError(
                    f"column {name!r} is not in file {str(rows[0].path)!r}; its columns are "
                    f"{listed}; name another with {option}"
                )
            return [row.fields.get(name) for row in rows]

        questions = [row.fields[question] for row in rows]
        for name, each in zip(names, questions, strict=True):
            if not each:
                raise ScoreModeError(
                    f"{name}: the question is empty; fill it in, or leave such rows out with "
                    "--skip-empty"
                )
        gold: list[str | None] = [None] * len(rows)
        if self.answer_column is not None or any(answer in row.fields for row in rows):
            answers = column("--answer-column", answer)
            gold = [None if each in (None, "") else str(each) for each in answers]
        choices = []
        if self.choices_column is not None:
            choices = column("--choices-column", self.choices_column)
            for name, each in zip(names, choices, strict=True):
                if not isinstance(each, list) or not all(isinstance(c, str) for c in each):
                    raise ScoreModeError(
                        f"{name}: {self.choices_column!r} is {each!r:.60}; give a list of texts "
                        "(in .jsonl or .parquet)"
                    )
        notes = [] if skipped is None else skipped.notes()
        return Questions(questions, names, gold, choices, notes)
