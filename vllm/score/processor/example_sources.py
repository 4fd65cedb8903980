"""Examples, questions with or without a known answer, from the hub and from local files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.score.data.tables import offline_if_unreachable
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
_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
            for number, (question, answer) in enumerate(rows)
        ]


def local_file(
    *,
    split: str = "train",
    path: str | Path | None = None,
    question: str = "question",
    answer: str | None = "answer",
    template: str | None = None,
) -> list[Example]:
    """The rows of a .jsonl, .json, .csv or .parquet file.

    Args:
        split: "train" for all rows, or a slice in the syntax of `datasets`, e.g. "train[:100]".
        path: of the file.
        question: column of the questions.
        answer: column of the answers, None without; null and "" are no answer.
        template: has "{question}" where the question goes; None takes questions as they are.

    Raises:
        ScoreModeError: the file, the split or a column is missing, or a question is no text.
    """
    import datasets

    if path is None:
        raise ScoreModeError("local_file needs path=, the file's.")
    file = Path(path)
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "does not exist"
        raise ScoreModeError(f"path {str(path)!r} {reason}; name a file.")
    if file.suffix not in _KINDS:
        raise ScoreModeError(
            f"path {str(path)!r} ends with {file.suffix!r}; it must be one of {', '.join(_KINDS)}."
        )
    kind = _KINDS[file.suffix]
    options: dict[str, Any] = {}
    if kind == "csv":
        # Of a field pandas would make a number, or nothing of an empty one or "NA".
        columns = (question,) if answer is None else (question, answer)
        options = {"converters": dict.fromkeys(columns, str), "na_filter": False}
    with tempfile.TemporaryDirectory() as cache:

        def load() -> Any:
            return datasets.load_dataset(
                kind,
                data_files=str(file.resolve()),
                split=split,
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )

        what = f"file {str(path)!r}"
        loaded = _loaded(load, what, split, 'its rows are the split "train"')
        rows = _columns(loaded, what, question, answer)
    return [
        Example(question if template is None else fill(template, question), answer)
        for question, answer in rows
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
        ) from (error)


def _columns(
    rows: Any, what: str, question: str, answer: str | None
) -> list[tuple[str, str | None]]:
    names = rows.column_names
    for field, column in (("question", question), ("answer", answer)):
        if column is not None and column not in names:
            more = ", or answer=None for none" if field == "answer" else ""
            raise ScoreModeError(
                f"{what} has no column {column!r}; its columns are {', '.join(names)}: name one "
                f"({field}=){more}."
            )
    questions = rows[question][:]
    answers = [None] * len(questions) if answer is None else rows[answer][:]
    for number, text in enumerate(questions):
        if not isinstance(text, str):
            raise ScoreModeError(
                f"{what}, row {number}: {question!r} is {text!r:.80}, not text; choose another "
                "column."
            )
    return [
        (text, None if known is None or known == "" else str(known))
        for text, known in zip(questions, answers, strict=True)
    ]


def _final_number(answer: str | None, where: str) -> str:
    if answer is None or _MARK not in answer:
        raise ScoreModeError(
            f"{where}: the answer {answer!r:.80} has no {_MARK} before its result."
        )
    return answer.rsplit(_MARK, 1)[1].strip().replace(",", "")
