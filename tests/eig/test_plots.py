"""Drawings hold the numbers of the traces; files are what their endings say."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.eig.trace_data import FAILED, FIRST, NAN, SECOND, trace
from vllm.score.eig.plots import FEW, draw_traces, plot_traces
from vllm.score.errors import ScoreModeError

TRACES = [FIRST, SECOND, FAILED]


def points(line: Any) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))


def same(found: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def dashed(axes: Any) -> list[Any]:
    return [line for line in axes.lines if line.get_linestyle() == "--"]


def test_few_traces_have_a_line_each():
    upper, lower = draw_traces(TRACES, lambda_cost=0.05).axes
    entropies = [line for line in upper.lines if len(line.get_xdata())]
    same(points(entropies[0]), [(0, 2.0), (8, 1.0), (20, 0.25)])
    same(points(entropies[1]), [(0, 1.5), (8, NAN), (16, 1.0), (24, 0.5)])
    same(points(entropies[2]), [(0, NAN)])
    gains = [container[0] for container in lower.containers]
    same(points(gains[0]), [(0, 1.0), (8, 0.5), (20, -0.125)])
    same(points(gains[1]), [(0, 0.75), (8, NAN), (16, 0.5), (24, 0.0)])
    same(points(gains[2]), [(0, NAN)])
    assert len({line.get_color() for line in gains}) == 3


def test_error_bars_are_one_standard_error_each_way():
    _, lower = draw_traces([FIRST, SECOND], lambda_cost=0.05).axes
    first, second = (container[2][0].get_segments() for container in lower.containers)
    bars = [[(0, 0.75), (0, 1.25)], [(8, 0.375), (8, 0.625)], [(20, -0.1875), (20, -0.0625)]]
    np.testing.assert_array_equal(np.array(first), np.array(bars))
    drawn = [
        bar for bar in second if len(bar) == 2 and np.isfinite(bar).all()
    ]  # one forecast has none
    np.testing.assert_array_equal(
        np.array(drawn), np.array([[(16, 0.25), (16, 0.75)], [(24, -0.5), (24, 0.5)]])
    )


def test_a_dashed_line_at_the_cost():
    upper, lower = draw_traces(TRACES, lambda_cost=0.3).axes
    (line,) = dashed(lower)
    assert set(line.get_ydata()) == {0.3}
    assert line.get_label() == "cost of a step, 0.3"
    assert not dashed(upper)
    assert not dashed(draw_traces(TRACES, lambda_cost=None).axes[1])


def test_many_traces_are_thin_under_their_median():
    many = [FIRST, SECOND, FAILED] * 4 + [trace([0, 12], [3.0, 0.5], [0.0, 0.25], [0.1, 0.1])]
    assert len(many) == FEW + 1
    upper, lower = draw_traces(many, lambda_cost=0.05).axes
    for axes, values in (
        (upper, [each.entropies for each in many]),
        (lower, [each.gains for each in many]),
    ):
        (median,) = (
            line for line in axes.lines if str(line.get_label()).startswith("median of those")
        )
        thin = [line for line in axes.lines if line.get_linewidth() == 0.7]
        assert len(thin) == len(many)
        for line, each, value in zip(thin, many, values, strict=True):
            same(points(line), list(zip([s.position for s in each.steps], value, strict=True)))
        assert median.get_linewidth() > 1.5
        assert not axes.containers
    # H, first decisions: 4 x 2, 4 x 1.5, 3; second: 4 x 1 and 0.5; third: 4 x 0.25, 4 x 1.
    (median,) = (line for line in upper.lines if line.get_linewidth() == 2)
    same(points(median), [(0, 2.0), (8, 1.0), (18, 0.625), (24, 0.5)])
    # EIG: 4 x 1, 4 x 0.75, 0; 4 x 0.5, 0.25; 4 x -0.125, 4 x 0.5; 0.
    (median,) = (line for line in lower.lines if line.get_linewidth() == 2)
    same(points(median), [(0, 0.75), (8, 0.5), (18, 0.1875), (24, 0.0)])


@pytest.mark.parametrize("number", [1, 5, FEW, FEW + 1])
def test_nothing_but_missing_values_draws_without_a_warning(number):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_traces([FAILED] * number, lambda_cost=0.05)
        figure.draw_without_rendering()


def test_axes_have_names_and_units():
    upper, lower = draw_traces(TRACES, lambda_cost=0.05, title="a\n$x$").axes
    assert upper.get_ylabel() == "H (nats)" and lower.get_ylabel() == "EIG (nats)"
    assert lower.get_xlabel() == "tokens of reasoning"
    assert upper.get_xlim() == lower.get_xlim()
    figure = upper.figure
    assert figure.get_suptitle() == "a↵$x$"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "question 1",
        "question 2",
        "question 3",
        "cost of a step, 0.05",
    ]


def test_a_picture_has_ink(tmp_path: Path):
    plot_traces(TRACES, tmp_path / "a.png", lambda_cost=0.05)
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[1] == 1500
    half = pixels.shape[0] // 2
    for part in (pixels[:half], pixels[half:]):
        assert (part[..., :3].min(axis=-1) < 0.9).mean() > 0.005


def test_a_drawing_of_vectors(tmp_path: Path):
    plot_traces(TRACES, str(tmp_path / "a.svg"), lambda_cost=0.05, title="a < b")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag.endswith("}svg")
    assert "a < b" in "".join(root.itertext())
    plot_traces(TRACES, tmp_path / "a.PDF", lambda_cost=0.05)
    assert (tmp_path / "a.PDF").read_bytes().startswith(b"%PDF-")


def test_a_page_is_whole_and_needs_nothing_besides(tmp_path: Path):
    plot_traces(TRACES, tmp_path / "a.html", lambda_cost=0.05, title="<script>alert(1)</script>")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and text.count("<svg") == 1
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "tokens of reasoning" in text


def test_the_same_traces_make_the_same_file(tmp_path: Path):
    for ending in ("svg", "pdf"):
        files = [tmp_path / f"{name}.{ending}" for name in "ab"]
        for file in files:
            plot_traces(TRACES, file, lambda_cost=0.05)
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", ["a.jpg", "a", "png"])
def test_another_ending_is_refused(name, tmp_path: Path):
    with pytest.raises(ScoreModeError, match=f"{name}'; a drawing can be written as .png"):
        plot_traces(TRACES, tmp_path / name, lambda_cost=0.05)
    assert not list(tmp_path.iterdir())


def test_no_traces_are_refused(tmp_path: Path):
    with pytest.raises(ScoreModeError, match="traces is empty"):
        plot_traces([], tmp_path / "a.png", lambda_cost=0.05)
