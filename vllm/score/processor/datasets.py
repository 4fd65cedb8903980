"""The data sets that prompts are drawn from, by name: GSM8K, local files, and one's own."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from vllm.score.checks import Count, check, check_name
from vllm.score.data.rows import Columns, read_rows
from vllm.score.data.tables import check_folder, offline_if_unreachable
from vllm.score.errors import ScoreModeError, first_line

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


Entry = Callable[..., list[Example]]


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
        remedy = (
            "check split and config, or fetch it elsewhere and register a local copy: "
            "register_dataset('gsm8k_r1_template', Gsm8kR1Template(path='folder', config=None), "
            "replace=True)"
        )
        with _loading(what, split, remedy), offline_if_unreachable(self.path):
            rows = datasets.load_dataset(self.path, self.config, split=split)
        named = ((f"{what}, row {number}", row) for number, row in enumerate(rows, 1))
        examples = []
        for where, text, known in _read(what, rows.column_names, named):
            _, mark, number = (known or "").rpartition(_MARK)
            if not mark:
                raise ScoreModeError(
                    f"{where}: the answer {known!r:.80} has no {_MARK} before its result."
                )
            examples.append(Example(fill(self.template, text), number.strip().replace(",", "")))
        return examples


def local_file(
    *,
    path: str | Path,
    split: str = "train",
    question: str = "question",
    answer: str | None = "answer",
    template: str | None = None,
) -> list[Example]:
    """The rows of a .jsonl, .json, .csv, .tsv or .parquet file, plain or compressed.

    Args:
        path: of the file.
        split: "train" for all rows, or a slice in the syntax of `datasets`, e.g. "train[:100]".
        question: column of the questions.
        answer: column of the answers, None without; null and "" are no answer.
        template: has "{question}" where the question goes; None takes questions as they are.

    Raises:
        ScoreModeError: the file, the split or a column is missing, or a question is no text.
    """
    from datasets import ReadInstruction

    what, wanted = f"file {str(path)!r}", Columns((), tuple(filter(None, (question, answer))))
    rows = list(read_rows([Path(path)], wanted, "questions"))
    with _loading(what, split, 'its rows are the split "train"'):
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    chosen = [row for part in parts for row in rows[part.from_ : part.to]]
    # Rows of JSON lines need not have all columns.
    columns = dict.fromkeys(name for row in rows for name in row.columns)
    return [
        Example(fill(template or _PLACE, text), known)
        for _, text, known in _read(
            what, list(columns), ((row.where, row.fields) for row in chosen), question, answer
        )
    ]


# Entries by name; an entry is called with `split=` and options and gives a list of examples: things
# with a `question` and, perhaps, an `answer`.
DATASET_REGISTRY: dict[str, Entry] = {
    "gsm8k_r1_template": Gsm8kR1Template(),
    "local_file": local_file,
}


def register_dataset(name: str, entry: Entry, *, replace: bool = False) -> None:
    """Add an entry to `DATASET_REGISTRY`.

    Raises:
        ScoreModeError: the name is taken (and `replace` not given), or the entry is no function.
    """
    if not callable(entry):
        raise ScoreModeError(
            f"the data set {name!r} must be a function of split= that returns examples, got "
            f"{entry!r:.80}."
        )
    if name in DATASET_REGISTRY and not replace:
        raise ScoreModeError(
            f"there is a data set {name!r} already; choose another name, or pass replace=True."
        )
    DATASET_REGISTRY[name] = entry


def sample(
    name: str, split: str, num: int | None = None, seed: int | None = None, **options: Any
) -> list[Any]:
    """Examples of a data set, drawn without replacement.

    Args:
        name: in `DATASET_REGISTRY`.
        split: of the data set, e.g. "train".
        num: how many, in random order; None for all, in their own order.
        seed: of the drawing; None draws anew each time.
        options: passed on to the entry.

    Raises:
        ScoreModeError: an unknown name, options that the entry does not take, fewer than `num`
            examples, or whatever the entry says.
    """
    check_name("data set (register_dataset adds your own)", name, DATASET_REGISTRY)
    entry = DATASET_REGISTRY[name]
    try:
        inspect.signature(entry).bind(split=split, **options)
    except TypeError as error:
        raise ScoreModeError(
            f"the data set {name!r} cannot be had with split={split!r} and the options "
            f"{', '.join(sorted(options)) or 'none'}: {error}."
        ) from error
    examples = list(entry(split=split, **options))
    if not examples:
        raise ScoreModeError(f"the data set {name!r} has no example in split {split!r}.")
    most = Annotated[Count, Field(le=len(examples))]
    num = check("num_prompts", num, most | None, f"None takes all of {name!r}, split {split!r}")
    return examples if num is None else random.Random(seed).sample(examples, num)


def fill(template: str, question: str) -> str:
    """The template with the question in its place; other braces stay."""
    if _PLACE not in template:
        raise ScoreModeError(f"template must have {_PLACE} where the question goes: {template!r}.")
    return template.replace(_PLACE, question)


@contextmanager
def _loading(what: str, split: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets', pyarrow's, pandas' and HTTP errors
        raise ScoreModeError(
            f"{what}, split {split!r}, cannot be loaded: {first_line(error)} ({remedy})."
        ) from error


def _read(
    what: str,
    columns: Sequence[str],
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    question: str = "question",
    answer: str | None = "answer",
) -> Iterator[tuple[str, str, str | None]]:
    """Where a row stands, its question, and its answer or None, of (where, fields) of each row."""
    for field, column in (("question", question), ("answer", answer)):
        if column is not None and column not in columns:
            raise ScoreModeError(
                f"{what} has no column {column!r}; its columns are {', '.join(columns)}: name one "
                f"by {field}= (answer=None for none)."
            )
    for where, row in rows:
        text, known = row.get(question), None if answer is None else row.get(answer)
        if not isinstance(text, str):
            raise ScoreModeError(
                f"{where}: {question!r} is {text!r:.80}, not text; choose another column."
            )
        yield where, text, None if known is None or known == "" else str(known)
