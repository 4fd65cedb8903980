"""Which texts, pairs or questions a command reads, and where it may write, from its options."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from vllm.score.data import Source, TextSource, file_source, hub_source, stdin_source
from vllm.score.data.rows import Columns, Row, Skipped, no_column, read_rows
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import flag
from vllm.score.tokens import encode_inputs

STANDARD_INPUT = "-"
QUESTION, ANSWER = "question", "answer"
_NO_FILE = "no file is named; add --file PATH"


@dataclass(frozen=True)
class Pairs:
    """Pairs of context and target.

    Attributes:
        rows: (context, target).
        names: what errors call them.
        notes: what the reader of the results should know of the files.
    """

    rows: Sequence[tuple[Any, str]]
    names: Sequence[str]
    notes: Sequence[str] = ()


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
        return [tokens.ids for tokens in encode_inputs(tokenizer, self.given, self.names)]


def check_text(options: Namespace) -> bool:
    """Whether a text is named.

    Raises:
        ScoreModeError: for options that do not go together.
    """
    dataset, text, files = options.dataset, options.text, options.file
    _only_one("a text", dataset=dataset, text=text, file=files or None)
    if dataset is None:
        refuse_given(
            options, ("dataset_config", "split"), "no dataset is named; add --dataset NAME"
        )
    if STANDARD_INPUT in files and len(files) > 1:
        raise ScoreModeError("--file - (standard input) cannot be joined with other files")
    if dataset is None and (not files or STANDARD_INPUT in files):
        why = "the text has no columns; leave it out"
        refuse_given(options, ("text_column", "skip_empty"), why)
    return dataset is not None or text is not None or bool(files)


def open_text(options: Namespace) -> Source:
    """The text; of a dataset after loading it.

    Raises:
        ScoreModeError: none is named, or it is not there.
    """
    rows = {"text_column": options.text_column, "skip_empty": options.skip_empty}
    if options.text is not None:
        return TextSource(options.text, name="--text")
    if STANDARD_INPUT in options.file:
        return stdin_source()
    if options.file:
        return file_source(options.file, **rows)
    if options.dataset is not None:
        split = options.split or "test"
        return hub_source(options.dataset, options.dataset_config, split=split, **rows)
    raise ScoreModeError(
        "a model is named and no text; give --file PATH (- for standard input), --dataset NAME or "
        "--text TEXT"
    )


def read_pairs(options: Namespace) -> Pairs:
    """The pairs of a file, or every target after every context.

    Raises:
        ScoreModeError: for options that do not go together, or a file that holds no pairs.
    """
    contexts, targets = options.context, options.target
    if options.file:
        _only_one("pairs", file=options.file, context=contexts or None, target=targets or None)
        context, target = options.context_column or "context", options.target_column or "target"
        remedy = "name the right ones with --context-column and --target-column"
        columns = Columns((context, target), remedy=remedy)
        rows, names, notes = _rows(options, columns, "pairs", target)
        pairs = [(row.fields[context], row.fields[target]) for row in rows]
    else:
        refuse_given(options, ("context_column", "target_column", "skip_empty"), _NO_FILE)
        if not contexts and not targets:
            raise ScoreModeError(
                "nothing to score; give --context TEXT --target TEXT, or --file PATH"
            )
        if not contexts:
            raise ScoreModeError(
                "--target is given without --context; add one (--context '' for none)"
            )
        if not targets:
            raise ScoreModeError("--context is given without --target; add one")
        pairs, notes = list(product(contexts, targets)), []
        names = [f"--context {c[:30]!r}, --target {t[:30]!r}" for c, t in pairs]
    if options.chat:
        pairs = [(_as_messages(context), target) for context, target in pairs]
    return Pairs(pairs, names, notes)


def read_questions(options: Namespace) -> Questions | None:
    """The questions of a file, or those given; None where there are none.

    Raises:
        ScoreModeError: for options that do not go together, or a file that holds no questions.
    """
    _only_one("questions", file=options.file or None, question=options.question or None)
    if options.file:
        found = _questions_of_files(options)
    else:
        columns = ("question_column", "answer_column", "choices_column", "skip_empty")
        refuse_given(options, columns, _NO_FILE)
        if not options.question:
            return None
        names = [f"--question {text[:30]!r}" for text in options.question]
        found = Questions(list(options.question), names, [None] * len(names))
    if not options.chat:
        return found
    return replace(found, given=[_as_messages(question) for question in found.given])


def _questions_of_files(options: Namespace) -> Questions:
    question = options.question_column or QUESTION
    answer, choice = options.answer_column or ANSWER, options.choices_column
    optional = (answer,) if choice is None else (answer, choice)
    columns = Columns((question,), optional, "name another with --question-column")
    rows, names, notes = _rows(options, columns, "questions", question)

    def column(field: str, name: str) -> list[Any]:
        """Of every row; a row may leave it out unless none has it."""
        if not any(name in row.fields for row in rows):
            where = f"file {str(rows[0].path)!r}"
            raise no_column(where, name, rows[0].columns, f"name another with {flag(field)}")
        return [row.fields.get(name) for row in rows]

    questions = [row.fields[question] for row in rows]
    for name, each in zip(names, questions, strict=True):
        if not each:
            raise ScoreModeError(
                f"{name}: the question is empty; fill it in, or leave such rows out with "
                "--skip-empty"
            )
    gold: list[str | None] = [None] * len(rows)
    if options.answer_column is not None or any(answer in row.fields for row in rows):
        answers = column("answer_column", answer)
        gold = [None if each in (None, "") else str(each) for each in answers]
    choices = [] if choice is None else column("choices_column", choice)
    for name, each in zip(names, choices, strict=False):
        if not isinstance(each, list) or not all(isinstance(c, str) for c in each):
            raise ScoreModeError(
                f"{name}: {choice!r} is {each!r:.60}; give a list of texts (in .jsonl or .parquet)"
            )
    return Questions(questions, names, gold, choices, notes)


def _rows(
    options: Namespace, columns: Columns, content: str, text: str
) -> tuple[list[Row], list[str], list[str]]:
    """The rows of --file, their names, and notes on those left out for an empty `text`."""
    skipped = Skipped((text,)) if options.skip_empty else None
    rows = list(read_rows(list(map(Path, options.file)), columns, content, skipped=skipped))
    names = [f"{row.path}, row {row.number}" for row in rows]
    return rows, names, [] if skipped is None else skipped.notes()


def _only_one(what: str, **given: Any) -> None:
    named = [flag(name) for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ScoreModeError(f"{' and '.join(named)} each name {what}; give one of them")


def _as_messages(text: Any) -> Any:
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def refuse_given(options: Namespace, names: Iterable[str], why: str) -> None:
    """Raise ScoreModeError for the first of these options that is given."""
    for name in names:
        value = getattr(options, name)
        if value not in (None, False):
            said = "given" if value is True else repr(value)
            raise ScoreModeError(f"{flag(name)} is {said}, but {why}")


def check_output(
    field: str, name: str | None, endings: Sequence[str], inputs: Sequence[str] = ()
) -> Path | None:
    """The file, which can be written, is none of the inputs, and ends in what it holds.

    Raises:
        ScoreModeError: it is not.
    """
    if name is None:
        return None
    path, said = Path(name), f"{flag(field)} {name!r}"
    if path.suffix.lower() not in endings:
        raise ScoreModeError(
            f"{said} is not of the kind that is written; name a file that ends in "
            f"{' or '.join(endings)}"
        )
    if any(path.resolve() == Path(each).resolve() for each in inputs):
        raise ScoreModeError(f"{said} is the text itself; name another file")
    if path.is_dir():
        raise ScoreModeError(f"{said} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ScoreModeError(f"{said} lies in a directory that does not exist; make it first")
    check_writable(said, path, path.absolute().parent)
    return path


def check_writable(said: str, path: Path, directory: Path) -> None:
    """Raise ScoreModeError where a file cannot be written, or none made in its directory."""
    try:
        tempfile.TemporaryFile(dir=directory).close()
        if path.is_file():
            path.open("ab").close()
    except OSError as error:
        raise ScoreModeError(
            f"{said} cannot be written ({error.strerror or error}); name another place"
        ) from error
