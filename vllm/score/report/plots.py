"""A run's losses as drawings, with matplotlib and no display, or as a page with a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.report.losses import LossSummary, summarize
from vllm.score.report.numbers import count, head, significant, tail, visible, visible_token
from vllm.score.report.style import (
    BLUE,
    GREY,
    LIGHT,
    RED,
    drawable,
    html_page,
    layout,
    style,
    svg,
)
from vllm.score.report.table import figure_cells, headline, provenance_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm.score.perplexity.metrics import PerplexityResult

FORMATS = (".png", ".html")
HARDEST_DRAWN = 12
_CONTEXT_WIDTH, _TOKEN_WIDTH = 42, 14  # characters


def write_plot(result: PerplexityResult, path: Path) -> None:
    """Draw a result into a .png file, or with a table of the hardest tokens into a .html page.

    Raises:
        ScoreModeError: for another ending.
    """
    check_format(path)
    summary = summarize(result)
    if path.suffix.lower() == ".png":
        with style():
            draw_all(result, summary).savefig(path, dpi=150)
        return
    page = render_page(result, summary, svg(draw_curves(summary)))
    path.write_text(page, encoding="utf-8")


def check_format(path: Path) -> None:
    """Raise ScoreModeError for a file whose ending is not one of `FORMATS`."""
    if path.suffix.lower() not in FORMATS:
        raise ScoreModeError(
            f"plot is {str(path)!r}; a drawing can be written as .png or .html, name such a file"
        )


def draw_all(result: PerplexityResult, summary: LossSummary) -> Figure:
    """Losses along the text, their distribution, the hardest tokens: one picture."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(12, 7.8), layout=layout())
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.7), height_ratios=(1, 1.05))
        draw_along_text(figure.add_subplot(grid[0, :]), summary)
        draw_distribution(figure.add_subplot(grid[1, 0]), summary)
        pair = grid[1, 1].subgridspec(1, 2, width_ratios=(1.35, 1))
        draw_hardest(figure.add_subplot(pair[0]), figure.add_subplot(pair[1]), summary)
        figure.suptitle(_title(result), fontsize=12, x=0.01, ha="left")
    return figure


def draw_curves(summary: LossSummary) -> Figure:
    """Losses along the text above their distribution."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(12, 7.2), layout=layout())
        upper, lower = figure.subplots(2, 1)
        draw_along_text(upper, summary)
        draw_distribution(lower, summary)
    return figure


def draw_along_text(axes: Axes, summary: LossSummary) -> None:
    """Block means with the spread of the single tokens (the tokens themselves if few)."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    blocks, length = len(summary.block_mean), summary.tokens / len(summary.block_mean)
    if len(summary.positions):
        axes.plot(
            summary.positions, summary.losses, ".", color=LIGHT, markersize=4, label="each token"
        )
    elif blocks > 1:
        axes.fill_between(
            summary.block_position,
            summary.block_low,
            summary.block_high,
            color=LIGHT,
            alpha=0.6,
            linewidth=0,
            label="10 % to 90 % of the tokens in a block",
        )
    if blocks > 1:
        label = f"mean of a block of {length:.0f} tokens"
        axes.plot(
            summary.block_position, summary.block_mean, color=BLUE, linewidth=1.5, label=label
        )
    label = f"mean of all, {significant(summary.mean, 4)}"
    axes.axhline(summary.mean, color=RED, linewidth=1.2, linestyle="--", label=label)
    axes.set(title="Loss along the text", xlabel="position in the text (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)


def draw_distribution(axes: Axes, summary: LossSummary) -> None:
    """Histogram with mean and median."""
    edges, shares = summary.histogram(bins=min(60, max(10, int(2 * summary.tokens**0.5))))
    axes.stairs(100 * shares, edges, fill=True, color=LIGHT)
    for value, name, line in ((summary.median, "median", ":"), (summary.mean, "mean", "--")):
        label = f"{name} {significant(value, 4)}"
        axes.axvline(value, color=RED, linewidth=1.2, linestyle=line, label=label)
    beyond = round(summary.tokens * (1 - shares.sum()))
    share = 100 * beyond / summary.tokens
    more = f"; {share:.1g} % beyond, up to {summary.largest:.1f}" if beyond else ""
    axes.set(title="Distribution of the loss", xlabel="loss (nats per token)" + more)
    axes.set_ylabel("tokens (%)")
    axes.set_xlim(left=0, right=edges[-1])
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", facecolor="white", framealpha=0.85, edgecolor="none")


def draw_hardest(text_axes: Axes, bar_axes: Axes, summary: LossSummary) -> None:
    """Side by side: each token after the characters before it, and its loss."""
    tokens = summary.hardest[:HARDEST_DRAWN]
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": 8, "va": "center"}
    rows = (HARDEST_DRAWN - 0.4, -0.6)
    text_axes.set(xlim=(0, 1), ylim=rows, title="Hardest tokens, after what precedes them")
    text_axes.axis("off")
    share = _CONTEXT_WIDTH / (_CONTEXT_WIDTH + _TOKEN_WIDTH)
    for row, token in enumerate(tokens):
        context = tail(visible(token.context, drawable), _CONTEXT_WIDTH)
        text = head(visible_token(token.text, token.token_id, drawable), _TOKEN_WIDTH)
        text_axes.text(share - 0.005, row, context, ha="right", color=GREY, **style)
        text_axes.text(share + 0.005, row, text, ha="left", color=RED, weight="bold", **style)
    losses = [token.loss for token in tokens]
    bars = bar_axes.barh(range(len(losses)), losses, height=0.62, color=LIGHT)
    bar_axes.bar_label(bars, fmt=" %.1f", fontsize=8, color=GREY)
    bar_axes.set(ylim=rows, yticks=[], xlabel="loss (nats)")
    bar_axes.set_xlim(left=0, right=1.15 * max(losses, default=1.0))
    bar_axes.spines["left"].set_visible(False)
    bar_axes.grid(visible=False)


def render_page(result: PerplexityResult, summary: LossSummary, drawing: str) -> str:
    """A drawing (an <svg> element), the hardest tokens in their context, figures, provenance."""
    number = "number"
    hardest = [
        (
            f"{token.loss:.3f}",
            count(token.position),
            f'<span class="context">{escape(visible(token.context))}</span>'
            f'<span class="token" title="token {token.token_id}">'
            f"{escape(visible_token(token.text, token.token_id))}</span>",
        )
        for token in summary.hardest
    ]
    figures = [map(escape, (*figure_cells(each), each.convention)) for each in result.figures]
    provenance = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>"
        for key, value in provenance_rows(result)
    )
    tables = (
        ("loss (nats)", "position", "token, after what precedes it"),
        ("figure", "value", "standard error", "95 % interval", "unit", "convention"),
    )
    body = (
        drawing,
        "<h2>Hardest tokens</h2>",
        _html_table(tables[0], (number, number, "text"), hardest),
        "<h2>Figures</h2>",
        _html_table(tables[1], ("", number, number, number, "", ""), figures),
        f"<h2>Where they come from</h2><table>{provenance}</table>",
        *(f"<p>{escape(note)}</p>" for note in result.notes),
    )
    return html_page(headline(result).plain, "\n".join(body))


def _html_table(names: Sequence[str], classes: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML; each column has a class, or "" for none."""

    def line(tag: str, cells: Iterable[str]) -> str:
        classed = zip(classes, cells, strict=True)
        return "".join(f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in classed)

    lines = [line("th", names), *(line("td", row) for row in rows)]
    return "\n".join(["<table>", *(f"<tr>{cells}</tr>" for cells in lines), "</table>"])


def _title(result: PerplexityResult) -> str:
    of = result.provenance
    model = tail(of.model, 50)
    return (
        f"Perplexity {significant(result.perplexity)} of {model} ({of.dtype}), "
        f"{count(of.scored_tokens)} tokens, windows {of.context_length}, stride {of.stride}"
    )
