"""The losses of a run: along the text, their distribution, the hardest tokens; as drawings, with
matplotlib and no display, or as a page with a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.report.style import (
    BLUE,
    GREY,
    LIGHT,
    RED,
    drawable,
    html_page,
    style,
    write_drawing,
)
from vllm.score.report.table import (
    count,
    figure_cells,
    head,
    headline,
    provenance_rows,
    significant,
    tail,
    visible,
    visible_token,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vllm.score.perplexity.metrics import PerplexityResult

FORMATS = (".png", ".html")
HARDEST_DRAWN = 12
_CONTEXT_WIDTH, _TOKEN_WIDTH = 42, 14  # characters
MOST_BLOCKS = 200  # points of the curve: more cannot be told apart on a page
SMALLEST_BLOCK = 16  # tokens; a mean of fewer follows the single tokens
MOST_POINTS = 2000  # up to so many tokens each is drawn by itself
HARDEST = 50
CONTEXT_CHARACTERS = 120
_CONTEXT_TOKENS = 4 * CONTEXT_CHARACTERS  # a character has four tokens at most
STEP = 1e-3  # nats; resolution of the quantiles
STEPS = 100_000  # a float32 log-softmax seldom goes beyond 100 nats


@dataclass(frozen=True)
class HardToken:
    """A token with a high loss.

    text: its characters; None where they are not known. context: the scored characters before it.
    loss: nats.
    """

    position: int
    token_id: int
    text: str | None
    context: str
    loss: float


@dataclass(frozen=True)
class Losses:
    """The losses of a run's tokens in short, in nats.

    tokens: how many.
    counts: int32 [blocks, steps], tokens by loss in steps of `STEP`, for each block of consecutive
        tokens; the last step has those above, too.
    sums: float64 [2, blocks], of the positions and of the losses.
    single: float64 [2, n], position and loss of each token where there are at most `MOST_POINTS`;
        else empty.
    hardest: highest loss first.
    """

    tokens: int
    counts: np.ndarray
    sums: np.ndarray
    single: np.ndarray
    hardest: tuple[HardToken, ...]

    @property
    def mean(self) -> float:
        return float(self.sums[1].sum()) / self.tokens

    def histogram(self, bins: int = 60, covered: float = 0.999) -> tuple[np.ndarray, np.ndarray]:
        """Share of the tokens by loss, from 0 to a loss that at least `covered` of them keep to:
        a few far out would press the others together.

        Returns:
            edges: float64 [bins + 1], nats.
            shares: float64 [bins]; 1 minus their sum lies beyond the last edge.
        """
        counts = self.counts.sum(axis=0)
        steps = int(np.searchsorted(np.cumsum(counts), covered * self.tokens)) + 1
        last = -(-steps // bins) * bins * STEP  # the edges are edges of steps
        middles = (np.arange(counts.size) + 0.5) * STEP
        found, edges = np.histogram(middles, bins, (0, last), weights=counts)
        return edges, found / self.tokens


def quantiles(counts: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Of the losses of one row of `Losses.counts`, as numpy interpolates them, to half a step."""
    below = np.cumsum(counts)
    ranks = np.multiply(shares, below[-1] - 1)
    low, high = (np.searchsorted(below, at(ranks), side="right") for at in (np.floor, np.ceil))
    return (low + (high - low) * (ranks % 1) + 0.5) * STEP


def losses_of(batches: Iterable[pa.RecordBatch], tokens: int) -> Losses:
    """Read the losses once, in bounded memory.

    Args:
        batches: as `PerplexityResult.batches`.
        tokens: rows of all of them, at least 1.
    """
    import pyarrow as pa

    number = max(1, min(MOST_BLOCKS, tokens // SMALLEST_BLOCK))
    ends = np.linspace(0, tokens, number + 1)[1:].astype(int)
    counts, sums = np.zeros((number, STEPS), np.int32), np.zeros((2, number))
    single: list[np.ndarray] = [np.zeros((2, 0))]
    hardest: list[HardToken] = []
    before: list[pa.RecordBatch] = []  # the last tokens
    done = 0
    for batch in batches:
        positions, nats = batch["position"].to_numpy(), -batch["logprob"].to_numpy().astype(float)
        block = np.searchsorted(ends, np.arange(done, done + nats.size), side="right")
        step = np.clip(nats / STEP, 0, STEPS - 1).astype(int)
        np.add.at(counts.reshape(-1), block * STEPS + step, 1)
        sums += [np.bincount(block, values, number) for values in (positions, nats)]
        done += nats.size
        if tokens <= MOST_POINTS:
            single.append(np.stack([positions, nats]))
        context = pa.Table.from_batches([*before, batch])
        least = hardest[-1].loss if len(hardest) == HARDEST else -np.inf
        hardest += [
            _hard_token(context, len(context) - nats.size + at, float(nats[at]))
            for at in np.argsort(-nats, kind="stable")[:HARDEST].tolist()
            if nats[at] > least
        ]
        hardest = sorted(hardest, key=lambda token: -token.loss)[:HARDEST]
        before = context[-_CONTEXT_TOKENS:].to_batches()
    return Losses(tokens, counts, sums, np.concatenate(single, axis=1), tuple(hardest))


def _hard_token(tokens: pa.Table, at: int, loss: float) -> HardToken:
    near = tokens[max(0, at - _CONTEXT_TOKENS) : at + 1]
    positions = near["position"].to_numpy()
    gaps = np.flatnonzero(np.diff(positions) != 1)  # tokens between were not scored
    *before, text = near["text"][int(gaps[-1]) + 1 if gaps.size else 0 :].to_pylist()
    context = "".join(part or "" for part in before)[-CONTEXT_CHARACTERS:]
    return HardToken(int(positions[-1]), near["token_id"][-1].as_py(), text, context, loss)


def write_plot(result: PerplexityResult, path: Path) -> None:
    """Draw a result into a .png file, or with a table of the hardest tokens into a .html page.

    Raises:
        ScoreModeError: for another ending.
    """
    losses = losses_of(result.batches(), result.provenance.scored_tokens)
    page = partial(render_page, result, losses)
    write_drawing(lambda: draw_all(result, losses), path, FORMATS, page)


def draw_all(result: PerplexityResult, losses: Losses) -> Figure:
    """Losses along the text, their distribution, the hardest tokens: one picture."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(12, 7.8))
        grid = figure.add_gridspec(2, 2, width_ratios=(1, 1.7), height_ratios=(1, 1.05))
        draw_along_text(figure.add_subplot(grid[0, :]), losses)
        draw_distribution(figure.add_subplot(grid[1, 0]), losses)
        pair = grid[1, 1].subgridspec(1, 2, width_ratios=(1.35, 1))
        draw_hardest(figure.add_subplot(pair[0]), figure.add_subplot(pair[1]), losses)
        figure.suptitle(_title(result), fontsize=12, x=0.01, ha="left")
    return figure


def draw_along_text(axes: Axes, losses: Losses) -> None:
    """Block means with the spread of the single tokens (the tokens themselves if few)."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    where, means = losses.sums / losses.counts.sum(axis=1)
    if losses.tokens <= MOST_POINTS:
        axes.plot(*losses.single, ".", color=LIGHT, markersize=4, label="each token")
    else:
        low, high = np.transpose([quantiles(block, (0.1, 0.9)) for block in losses.counts])
        label = "10 % to 90 % of the tokens in a block"
        axes.fill_between(where, low, high, color=LIGHT, alpha=0.6, linewidth=0, label=label)
    if means.size > 1:
        label = f"mean of a block of {losses.tokens / means.size:.0f} tokens"
        axes.plot(where, means, color=BLUE, linewidth=1.5, label=label)
    label = f"mean of all, {significant(losses.mean, 4)}"
    axes.axhline(losses.mean, color=RED, linewidth=1.2, linestyle="--", label=label)
    axes.set(title="Loss along the text", xlabel="position in the text (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2)


def draw_distribution(axes: Axes, losses: Losses) -> None:
    """Histogram with mean and median."""
    tokens, (median,) = losses.tokens, quantiles(losses.counts.sum(axis=0), [0.5])
    edges, shares = losses.histogram(bins=min(60, max(10, int(2 * tokens**0.5))))
    axes.stairs(100 * shares, edges, fill=True, color=LIGHT)
    for value, name, line in ((median, "median", ":"), (losses.mean, "mean", "--")):
        label = f"{name} {significant(value, 4)}"
        axes.axvline(value, color=RED, linewidth=1.2, linestyle=line, label=label)
    beyond = round(tokens * (1 - shares.sum()))
    largest = losses.hardest[0].loss
    more = f"; {100 * beyond / tokens:.1g} % beyond, up to {largest:.1f}" if beyond else ""
    axes.set(title="Distribution of the loss", xlabel="loss (nats per token)" + more)
    axes.set_ylabel("tokens (%)")
    axes.set_xlim(left=0, right=edges[-1])
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right", facecolor="white", framealpha=0.85, edgecolor="none")


def draw_hardest(text_axes: Axes, bar_axes: Axes, losses: Losses) -> None:
    """Side by side: each token after the characters before it, and its loss."""
    tokens = losses.hardest[:HARDEST_DRAWN]
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
    nats = [token.loss for token in tokens]
    bars = bar_axes.barh(range(len(nats)), nats, height=0.62, color=LIGHT)
    bar_axes.bar_label(bars, fmt=" %.1f", fontsize=8, color=GREY)
    bar_axes.set(ylim=rows, yticks=[], xlabel="loss (nats)")
    bar_axes.set_xlim(left=0, right=1.15 * max(nats, default=1.0))
    bar_axes.spines["left"].set_visible(False)
    bar_axes.grid(visible=False)


def render_page(result: PerplexityResult, losses: Losses, drawing: str) -> str:
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
        for token in losses.hardest
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
