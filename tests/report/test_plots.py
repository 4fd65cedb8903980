"""Drawings hold the numbers of the run; the page is whole and harmless."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from tests.report.test_losses import losses_in, some_logprobs
from vllm.score.errors import ScoreModeError
from vllm.score.report import plots
from vllm.score.report.plots import losses_of

pytestmark = pytest.mark.engine


class Page(HTMLParser):
    """Elements, cells and what an open page would fetch or run."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("#")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def page(result: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "loss.html"
    plots.write_plot(result, path)
    return path.read_text(encoding="utf-8")


def test_the_curve_is_the_mean_of_each_block(result, expected):
    axes = Figure().add_subplot()
    plots.draw_along_text(axes, losses_of(result.batches(), len(expected.losses)))
    drawn = {line.get_label(): line for line in axes.lines}
    points = drawn["each token"].get_ydata()
    assert np.asarray(points) == pytest.approx(expected.losses, abs=5e-5)
    (curve,) = (line for label, line in drawn.items() if label.startswith("mean of a block"))
    blocks = np.linspace(0, len(expected.losses), len(curve.get_ydata()) + 1).astype(int)
    means = [expected.losses[a:b].mean() for a, b in pairwise(blocks)]
    assert np.asarray(curve.get_ydata()) == pytest.approx(means, abs=5e-5)
    (mean,) = (line for label, line in drawn.items() if label.startswith("mean of all"))
    assert np.asarray(mean.get_ydata()) == pytest.approx(expected.losses.mean(), abs=5e-5)


def test_the_bars_are_the_highest_losses(result, expected):
    text_axes, bar_axes = Figure().subplots(1, 2)
    plots.draw_hardest(text_axes, bar_axes, losses_of(result.batches(), len(expected.losses)))
    widths = [bar.get_width() for bar in bar_axes.patches]
    highest = np.sort(expected.losses)[::-1][: plots.HARDEST_DRAWN]
    assert widths == pytest.approx(highest, abs=5e-5)
    assert len(text_axes.texts) == 2 * len(widths)


def test_every_axis_has_a_name_and_a_unit(result, expected):
    figure = plots.draw_all(result, losses_of(result.batches(), len(expected.losses)))
    along, distribution, _, bars = figure.axes
    assert along.get_xlabel() == "position in the text (tokens)"
    assert along.get_ylabel() == "loss (nats per token)"
    assert distribution.get_xlabel().startswith("loss (nats per token)")
    assert distribution.get_ylabel() == "tokens (%)"
    assert bars.get_xlabel() == "loss (nats)"
    assert all(axes.get_title(loc="left") or axes.get_title() for axes in (along, distribution))


@pytest.mark.parametrize("tokens", [1, 40, 1500, 20_000])
def test_title_and_legend_do_not_overlap(result, tokens):
    losses = losses_in(some_logprobs(tokens, seed=0))
    figure = plots.draw_all(result, losses)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    title = next(text for text in (axes.title, axes._left_title) if text.get_text())
    legend = axes.get_legend()
    assert not title.get_window_extent().overlaps(legend.get_window_extent())


def test_the_band_is_the_spread_within_each_block():
    logprobs = some_logprobs(5000, seed=3)
    axes = Figure().add_subplot()
    plots.draw_along_text(axes, losses_in(logprobs))
    (band,) = axes.collections
    drawn = band.get_paths()[0].vertices[:, 1]
    for begin, end in pairwise(np.linspace(0, 5000, plots.MOST_BLOCKS + 1).astype(int)):
        for bound in np.percentile(-logprobs[begin:end], [10, 90]):
            assert np.abs(drawn - bound).min() < 1e-3


def test_a_picture_is_written(result, tmp_path: Path, recwarn):
    path = tmp_path / "loss.png"
    plots.write_plot(result, path)
    pixels = imread(path)
    assert pixels.shape[1] >= 1200
    # Ink in every quarter of the picture.
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    for rows in (slice(0, height), slice(height, None)):
        for columns in (slice(0, width), slice(width, None)):
            assert pixels[rows, columns, :3].std() > 0.02
    # A glyph that the font lacks would be an empty box.
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_the_page_needs_nothing_besides(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.fetched == []
    assert not {"script", "link", "iframe", "img"} & set(parsed.tags)
    assert "@import" not in page
    ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])


def test_the_page_lists_the_hardest_tokens_in_their_context(page, expected):
    rows = [row for row in Page(page).rows if len(row) == 3]
    highest = np.sort(expected.losses)[::-1]
    found = [float(loss) for loss, *_ in rows[1:]]
    assert found == pytest.approx(highest[: len(found)], abs=6e-4)
    assert len(found) == 50
    # The text's own markup is shown, not obeyed: no element of that name is on the page.
    assert "b" not in Page(page).tags
    assert any("<b>" in text for *_, text in rows)


def test_the_page_has_every_figure(page, result):
    text = re.sub(r"\s+", " ", page)
    for figure in result.figures:
        assert f">{figure.convention}" in text
    assert result.provenance.text_sha256[:12] in text
    for note in result.notes:
        assert note.split("<")[0][:40] in page


def test_another_ending_is_refused(result, tmp_path: Path):
    with pytest.raises(ScoreModeError, match=r"loss\.jpg.*\.png or \.html"):
        plots.write_plot(result, tmp_path / "loss.jpg")
    assert list(tmp_path.iterdir()) == []
