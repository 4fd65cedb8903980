"""Examples, questions with or without a known answer, from the hub and from local files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from vllm.score.data.rows import Columns, Row, read_rows
from vllm.score.data.tables import check_folder, offline_if_unreachable
from vllm.score.errors import ScoreModeError

R1_TEMPLATE = (
    "A user asks a question and an assistant answers it. The assistant first works the problem out "
    "step by step, between <think> and </think>. It then gives the final result alone, between "
    "<answer> and </answer>: <think> the work </think> <answer> the result </answer>.\n"
    "User: {question}\n"
    "Assistant: <think>"
)
_PLACE = "{question}"
_MARK = "####"  # stands before the final result in GSM8K's answers


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        question: the prompt, as the model is given it.
        answer: the right answer, None where it is not known.
    """

    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Gsm8kR1Template:
    """GSM8K's word problems, in a template that asks for reasoning and then an answer in tags.

    Attributes:
        path: of the data set on the Hugging Face Hub, or a local copy's folder.
        config: of the data set; None for a folder that has none.
        template: has "{question}" where the question goes.
    """

    path: str = "openai/gsm8k"
    config: str | None = "main"
    template: str = R1_TEMPLATE

    def __call__(self, split: str = "train") -> list[Example]:
        """The examples of a split; answers are the numbers, without commas.

        Raises:
            ScoreModeError: the data set, the split or a column is missing, or an answer has no
                "####".
        """
        import datasets

        check_folder(self.path)
        what = f"data set {self.path!r}"

        def load() -> Any:
            with offline_if_unreachable(self.path):
                return datasets.load_dataset(self.path, self.config, split=split)

        remedy = (
            "check split and config, or fetch it elsewhere and register a local copy: "
            "register_dataset('gsm8k_r1_template', Gsm8kR1Template(path='folder', config=None), "
            "replace=True)"
        )
        rows = _columns(_loaded(load, what, split, remedy), what, "question", "answer")
        return [
            Example(fill(self.template, question), _final_number(answer, f"{what}, row {number}"))
            for number, (question, answer) in enumerate(rows, 1)
        ]


def local_file(
    *,
    split: str = "train",
    path: str | Path | None = None,
    question: str = "question",
    answer: str | None = "answer",
    template: str | None = None,
) -> list[Example]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, plain or compressed.

    Args:
        split: "train" for all rows, or a slice in the syntax of `datasets`, e.g. "train[:100]".
        path: of the file.
        question: column of the questions.
        answer: column of the answers, None without; null and "" are no answer.
        template: has "{question}" where the question goes; None takes questions as they are.

    Raises:
        ScoreModeError: the file, the split or a column is missing, or a question is no text.
    """
    if path is None:
        raise ScoreModeError("local_file needs path=, the file's.")
    file, wanted = Path(path), {"question": question}
    if answer is not None:
        wanted["answer"] = answer
    rows = list(read_rows([file], Columns((), tuple(wanted.values())), "questions"))
    for field, column in wanted.items():
        if not any(column in row.fields for row in rows):
            raise _no_column(f"file {str(path)!r}", field, column, rows[0].columns)
    return [
        Example(
            _question(row.fields.get(question), question, row.where, template),
            None if answer is None else _answer(row.fields.get(answer)),
        )
        for row in _part(rows, split, f"file {str(path)!r}")
    ]


def fill(template: str, question: str) -> str:
    """The template with the question in its place; other braces stay."""
    if _PLACE not in template:
        raise ScoreModeError(f"template must have {_PLACE} where the question goes: {template!r}.")
    return template.replace(_PLACE, question)


def _loaded(load: Callable[[], Any], what: str, split: str, remedy: str) -> Any:
    try:
        return load()
    except Exception as error:  # datasets', pyarrow's, pandas' and HTTP errors
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ScoreModeError(
            f"{what}, split {split!r}, cannot be loaded: {text} ({remedy})."
        ) from error


def _part(rows: list[Row], split: str, what: str) -> list[Row]:
    """The rows that a split names, in the syntax of `datasets`."""
    from datasets import ReadInstruction

    def read() -> list[Row]:
        found = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
        return [row for part in found for row in rows[part.from_ : part.to]]

    return cast(list[Row], _loaded(read, what, split, 'its rows are the split "train"'))


def _columns(rows: Any, what: str, question: str, answer: str) -> list[tuple[str, str | None]]:
    names = rows.column_names
    for field, column in (("question", question), ("answer", answer)):
        if column not in names:
            raise _no_column(what, field, column, names)
    return [
        (_question(text, question, f"{what}, row {number}", None), _answer(known))
        for number, (text, known) in enumerate(
            zip(rows[question][:], rows[answer][:], strict=True), 1
        )
    ]


def _no_column(what: str, field: str, column: str, columns: Sequence[str]) -> ScoreModeError:
    more = ", or answer=None for none" if field == "answer" else ""
    return ScoreModeError(
        f"{what} has no column {column!r}; its columns are {', '.join(columns)}: name one "
        f"({field}=){more}."
    )


def _question(text: Any, column: str, where: str, template: str | None) -> str:
    if not isinstance(text, str):
        raise ScoreModeError(
            f"{where}: {column!r} is {text!r:.80}, not text; choose another column."
        )
    return text if template is None else fill(template, text)


def _answer(known: Any) -> str | None:
    return None if known is None or known == "" else str(known)


def _final_number(answer: str | None, where: str) -> str:
    if answer is None or _MARK not in answer:
        raise ScoreModeError(
            f"{where}: the answer {answer!r:.80} has no {_MARK} before its result."
        )
    return answer.rsplit(_MARK, 1)[1].strip().replace(",", "")
