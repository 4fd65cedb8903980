"""A result as a table for people (80 columns are enough, colours on a terminal), or as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm.score.report.numbers import count, json_safe, short_hash, significant

if TYPE_CHECKING:
    from vllm.score.perplexity.metrics import Metric, PerplexityResult, Provenance

LABELS = {
    "nll": "loss",
    "token_perplexity": "perplexity per token",
    "bits_per_token": "bits per token",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
}


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
    label = LABELS.get(figure.name, figure.name)
    return (
        f"{label}, {figure.variant}" if figure.variant else label,
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
        ("model", f"{of.model}, weights {short_hash(of.model_sha256)}"),
        ("computed in", f"{of.dtype}, quantisation {of.quantization}"),
        ("tokenizer", short_hash(of.tokenizer_sha256)),
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
        f"{documents}, hash {short_hash(of.text_sha256)}",
    ]
    if of.block_length is not None:
        parts.append(f"errors: block bootstrap, {of.block_length} tokens per block")
    return "; ".join(parts)


def _title(convention: str) -> str:
    return "this run" if convention == "run" else convention
