"""What all drawings, and the pages that hold them, have in common."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, LIGHT, RED, GREY = "#1f5a94", "#a9c7e4", "#b3261e", "#5f6368"
_STYLE = {
    "figure.constrained_layout.use": True,  # panels leave each other room
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.parse_math": False,  # a dollar in a text is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-score",
}

_PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202124; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e6e6e6;
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .86rem;
        white-space: pre-wrap; overflow-wrap: anywhere; }
.context { color: #5f6368; } .token { color: #b3261e; font-weight: bold; }
"""


def style() -> AbstractContextManager[None]:
    """matplotlib's settings within a `with`."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


@lru_cache(maxsize=1 << 12)
def drawable(char: str) -> bool:
    """Whether the font of the drawings has the character."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    return char.isprintable() and font.get_char_index(ord(char)) != 0


def svg(figure: Figure) -> str:
    """The drawing as an <svg> element: the same for the same drawing."""
    drawing = io.StringIO()
    with style():
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    text = drawing.getvalue()
    return text[text.index("<svg") :]  # without the declarations of a file of its own


def write_drawing(
    draw: Callable[[], Figure], path: Path, formats: Sequence[str], page: Callable[[str], str]
) -> None:
    """Write a drawing as the ending of the path says: .png, .svg, .pdf or .html.

    Args:
        draw: makes it.
        formats: the endings that are possible.
        page: the HTML file around an <svg> element.

    Raises:
        ScoreModeError: another ending.
    """
    ending = path.suffix.lower()
    if ending not in formats:
        raise ScoreModeError(
            f"plot is {str(path)!r}; a drawing can be written as {' or '.join(formats)}, name such "
            "a file"
        )
    figure = draw()
    if ending in (".svg", ".html"):
        text = svg(figure)
        path.write_text(page(text) if ending == ".html" else text, encoding="utf-8")
    else:
        with style():
            metadata = {"CreationDate": None} if ending == ".pdf" else None
            figure.savefig(path, dpi=150, metadata=metadata)


def html_page(title: str, body: str) -> str:
    """An HTML file that needs nothing besides.

    Args:
        title: plain text, also the headline.
        body: HTML.
    """
    name = escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_PAGE_STYLE}</style></head><body>
<h1>{name}</h1>
{body}
</body></html>
"""
