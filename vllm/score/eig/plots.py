"""Entropy and expected gain along traces, with matplotlib and no display."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.eig.records import Trace
from vllm.score.errors import ScoreModeError
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
from vllm.score.report.table import head, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf", ".html")
FEW = 12  # traces that can be told apart
_ERRORS: dict[str, Any] = {"linewidth": 1.3, "elinewidth": 0.9, "capsize": 2}
_THIN: dict[str, Any] = {"color": LIGHT, "linewidth": 0.7, "markersize": 2, "alpha": 0.7}
_TITLE_WIDTH = 100  # characters


def plot_traces(
    traces: Sequence[Trace], path: str | Path, *, lambda_cost: float | None, title: str = ""
) -> None:
    """Draw H_t and EIG_t (with its standard error) along each trace into a file.

    Args:
        path: a file whose ending is one of `FORMATS`; a .html page needs nothing besides.
        lambda_cost: the cost of a step, nats; None for rules without one.

    Raises:
        ScoreModeError: another ending, or no traces.
    """
    draw = partial(draw_traces, traces, lambda_cost=lambda_cost, title=title)
    page = partial(html_page, title or "Expected information gain along each trace")
    write_drawing(draw, Path(path), FORMATS, page)


def draw_traces(traces: Sequence[Trace], *, lambda_cost: float | None, title: str = "") -> Figure:
    """H_t above EIG_t over tokens of reasoning. Up to `FEW` traces have a line each with standard
    errors; more are thin lines under their median. A missing value interrupts its line.

    Raises:
        ScoreModeError: no traces.
    """
    from matplotlib.figure import Figure

    if not traces:
        raise ScoreModeError("traces is empty; a drawing needs at least one")
    with style():
        figure = Figure(figsize=(10, 7))
        upper, lower = figure.subplots(2, 1, sharex=True)
        if len(traces) <= FEW:
            _draw_each(upper, lower, traces)
        else:
            _draw_many(upper, [trace.entropies for trace in traces], traces)
            _draw_many(lower, [trace.gains for trace in traces], traces)
        if lambda_cost is not None:
            label = f"cost of a step, {lambda_cost:g}"
            lower.axhline(lambda_cost, color=RED, linewidth=1.2, linestyle="--", label=label)
        upper.set(title="Entropy of the answer", ylabel="H (nats)")
        upper.set_ylim(bottom=0)
        lower.set(title="Expected information gain of one more step", ylabel="EIG (nats)")
        lower.set_xlabel("tokens of reasoning")
        handles = {
            label: handle
            for axes in (upper, lower)
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if handles:
            figure.legend(
                handles.values(), handles.keys(), loc="outside right upper", frameon=False
            )
        if title:
            line = head(visible(title, drawable), _TITLE_WIDTH)
            figure.suptitle(line, fontsize=12, x=0.01, ha="left")
    return figure


def _draw_each(upper: Axes, lower: Axes, traces: Sequence[Trace]) -> None:
    from matplotlib import colormaps

    colors = colormaps["tab20" if len(traces) > 10 else "tab10"]
    for number, trace in enumerate(traces):
        color, label = colors(number), f"question {number + 1}"
        x = _positions(trace)
        upper.plot(x, trace.entropies, ".-", color=color, linewidth=1.3, label=label, clip_on=False)
        errors = _standard_errors(trace)
        lower.errorbar(x, trace.gains, errors, fmt=".-", color=color, label=label, **_ERRORS)


def _draw_many(axes: Axes, values: Sequence[np.ndarray], traces: Sequence[Trace]) -> None:
    for number, (trace, y) in enumerate(zip(traces, values, strict=True)):
        label = f"each of {len(traces)} questions" if number == 0 else None
        axes.plot(_positions(trace), y, ".-", label=label, **_THIN)
    axes.plot(
        *_medians([_positions(trace) for trace in traces], values),
        ".-",
        color=BLUE,
        linewidth=2,
        label="median of those\nstill reasoning",
    )
    axes.axhline(0, color=GREY, linewidth=0.6)


def _medians(
    positions: Sequence[np.ndarray], values: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of the first decisions, the second ones and so on, over the traces that have one: [n]
    positions and values. Inserted prompts shift positions, so that few of them are equal."""
    longest = max(len(x) for x in positions)
    x, y = (np.full((len(positions), longest), np.nan) for _ in range(2))
    for row, (where, value) in enumerate(zip(positions, values, strict=True)):
        x[row, : len(where)], y[row, : len(value)] = where, value
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)  # the line is interrupted
        return np.nanmedian(x, axis=0), np.nanmedian(y, axis=0)


def _positions(trace: Trace) -> np.ndarray:
    return np.array([step.position for step in trace.steps], dtype=np.float64)


def _standard_errors(trace: Trace) -> np.ndarray:
    found = [step.decision.estimate for step in trace.steps]
    return np.array([np.nan if each is None else each.standard_error for each in found])
