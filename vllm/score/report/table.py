"""A result as a table for people (80 columns are enough, colours on a terminal), or as JSON.

Below it how all reports write numbers and characters.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from vllm.score.perplexity.metrics import Metric, PerplexityResult, Provenance

PART = "⋯"
_MARKS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Baseline:
    """The perplexity per token of a guess without the model, on the same tokens.

    name: a word, e.g. "uniform".
    meaning: what is guessed, in words.
    """

    name: str
    meaning: str
    perplexity: float


def plain_table(*columns: str, right: Collection[str] = (), fold: Collection[str] = ()) -> Table:
    """A table without borders, to which rows are added.

    Args:
        columns: their names.
        right: those of numbers, which stand at the right.
        fold: those whose texts may go over several lines.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name not in fold,
            overflow="fold",
        )
    return table


def to_json(result: PerplexityResult, baselines: Sequence[Baseline] = ()) -> str:
    """Everything but the tokens, as one JSON object.

    Its keys are those of `PerplexityResult.to_dict`, and "baselines": name -> perplexity. JSON has
    no infinity: a perplexity beyond float64 is the string "Infinity".
    """
    content = result.to_dict()
    content["baselines"] = {baseline.name: baseline.perplexity for baseline in baselines}
    return json.dumps(json_safe(content), indent=2, ensure_ascii=False, allow_nan=False)


def print_result(
    result: PerplexityResult, console: Console, baselines: Sequence[Baseline] = ()
) -> None:
    """The headline, the figures by convention, where they come from, and notes."""
    console.print(headline(result), soft_wrap=True)
    for baseline in baselines:
        name, value = baseline.name.capitalize(), significant(baseline.perplexity)
        line = f"{name:<10} {value}   {baseline.meaning}"
        console.print(Text(line, style="dim"), soft_wrap=True)
    console.print()
    console.print(figure_table(result.figures))
    console.print()
    provenance = Table.grid(padding=(0, 2, 0, 0))
    provenance.add_column(style="cyan", no_wrap=True)
    provenance.add_column(overflow="fold")
    for key, value in provenance_rows(result):
        provenance.add_row(key, Text(value))
    console.print(provenance)
    for note in result.notes:
        console.print()
        console.print(Text(f"Note: {note}", style="yellow"))


def headline(result: PerplexityResult) -> Text:
    """The perplexity of the run with its interval, in one line."""
    figure = result.figure("token_perplexity")
    text = Text.assemble(("Perplexity ", "bold"), (significant(figure.value), "bold green"))
    if figure.interval is None:
        return text.append("   (too few tokens for an interval)")
    low, high = (significant(bound) for bound in figure.interval)
    return text.append(f"   95 % interval {low} to {high}")


def figure_table(figures: Sequence[Metric]) -> Table:
    """One row per figure, under the name of its convention."""
    numbers = ("value", "std. error")
    table = plain_table("figure", *numbers, "unit", right=numbers, fold=("figure",))
    several = len({figure.convention for figure in figures}) > 1
    seen: str | None = None
    for figure in figures:
        if several and figure.convention != seen:
            table.add_row(Text(_title(figure.convention), style="cyan"))
            seen = figure.convention
        label, value, error, _, unit = figure_cells(figure)
        table.add_row(Padding(Text(label), (0, 0, 0, 2 if several else 0)), value, error, unit)
    return table


def figure_cells(figure: Metric) -> tuple[str, str, str, str, str]:
    """(what it is, value, standard error, interval, unit), "" for what is not there."""
    return (
        figure.label,
        significant(figure.value),
        "" if figure.standard_error is None else significant(figure.standard_error, 3),
        "" if figure.interval is None else " to ".join(map(significant, figure.interval)),
        figure.unit,
    )


def provenance_rows(result: PerplexityResult) -> list[tuple[str, str]]:
    """What the figures depend on, as (key, value): once what all share, then by convention."""
    of = result.provenance
    versions = ", ".join(f"{name} {number}" for name, number in of.versions.items())
    by_convention = {figure.convention: figure.provenance for figure in result.figures}
    return [
        ("model", f"{of.model}, weights {of.model_sha256[:12]}"),
        ("computed in", f"{of.dtype}, quantisation {of.quantization}"),
        ("tokenizer", of.tokenizer_sha256[:12]),
        ("text", of.text_source),
        ("versions", versions),
        *((_title(name), _procedure(which)) for name, which in by_convention.items()),
    ]


def _procedure(of: Provenance) -> str:
    """How the figures of one convention were computed, in one sentence."""
    several = f"{count(of.num_documents)} documents, {of.documents}"
    documents = "1 document" if of.num_documents == 1 else several
    parts = [
        f"{count(of.windows)} windows of {of.context_length}, stride {of.stride}",
        f"{count(of.scored_tokens)} of {count(of.text_tokens)} tokens scored",
        f"BOS: {of.bos}",
        f"{documents}, hash {of.text_sha256[:12]}",
    ]
    if of.block_length is not None:
        parts.append(f"errors: block bootstrap, {of.block_length} tokens per block")
    return "; ".join(parts)


def _title(convention: str) -> str:
    return "this run" if convention == "run" else convention


def significant(value: float, digits: int = 6) -> str:
    """A number with so many significant digits: all before the point, 4 after it at most.

    >>> significant(26.48123), significant(0.0123456), significant(2048.0), significant(1234.5, 3)
    ('26.4812', '0.0123', '2048.00', '1234')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    whole = math.floor(math.log10(abs(value))) + 1  # digits before the point; below 0.1 negative
    return f"{value:.{max(0, min(4, digits - whole))}f}"


def count(number: int) -> str:
    """A count with its thousands apart."""
    return f"{number:,}"


def json_safe(value: Any) -> Any:
    """`value` with each infinity, which JSON does not have, as the string "Infinity"."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def visible(text: str, drawable: Callable[[str], bool] = str.isprintable) -> str:
    """The text in one line; what cannot be shown as its escape sequence.

    Args:
        drawable: whether a character can be shown (by a font).
    """

    def mark(char: str) -> str:
        shown = char if drawable(char) else char.encode("unicode_escape").decode("ascii")
        return _MARKS.get(char, shown)

    return "".join(map(mark, text))


def visible_token(
    text: str | None, token_id: int, drawable: Callable[[str], bool] = str.isprintable
) -> str:
    """The same of a token, with a mark for each space; `PART` for a later part of a character that
    several tokens make up; the id where the characters are not known."""
    if text is None:
        return f"[{token_id}]"
    return visible(text, drawable).replace(" ", "␣") or PART


def head(text: str, width: int) -> str:
    """The text, or its beginning and a mark in `width` characters."""
    return text if len(text) <= width else text[: width - 1] + "…"


def tail(text: str, width: int) -> str:
    """The text, or a mark and its end in `width` characters."""
    return text if len(text) <= width else "…" + text[1 - width :]
