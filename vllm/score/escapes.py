"""Line breaks in texts that come from a command line."""

from __future__ import annotations

import re

_ESCAPES = {r"\n": "\n", "\\\\": "\\"}


def unescape(text: str) -> str:
    r"""The text with each `\n` as a line break and each `\\` as a backslash.

    Whatever else follows a backslash stays as it is: `\boxed{` needs no doubling.
    """
    return re.sub(r"\\[n\\]", lambda found: _ESCAPES[found[0]], text)
