"""What all drawings have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

BLUE, LIGHT, RED, GREY = "#1f5a94", "#a9c7e4", "#b3261e", "#5f6368"
_STYLE = {
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


def style() -> AbstractContextManager[None]:
    """matplotlib's settings within a `with`."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def layout() -> Any:
    """Panels that leave each other room."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)


@lru_cache(maxsize=1 << 12)
def drawable(char: str) -> bool:
    """Whether the font of the drawings has the character."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans Mono"))
    return char.isprintable() and font.get_char_index(ord(char)) != 0
