"""A process that answers whether two mathematical texts are equal; run as a script.

math-verify limits its time by signals, which work in a main thread only, and a power tower goes
past any limit. Here it has a main thread of its own, and whoever waits can end the process.

Reads lines ``[gold, answer]`` (JSON) and writes lines ``{"equal": bool}`` or ``{"error": text}``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from typing import Any

SECONDS = 3  # of each parsing and each comparison
MEMORY = 8 << 30
# Text without a word of letters is a formula; the names of LaTeX's commands are no words.
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_DELIMITER = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")


def parsed(text: str) -> list[Any]:
    """What math-verify reads in a text; nothing if it holds no mathematics."""
    from math_verify import parse

    text = text.strip()
    if text and not _WORD.search(text) and not _DELIMITER.search(text):
        # It finds formulae between delimiters only, and elsewhere the last number.
        found: list[Any] = parse(f"${text}$", parsing_timeout=SECONDS)
        if found:
            return found
    return list(parse(text, parsing_timeout=SECONDS))


def answer(gold: str, given: str) -> dict[str, Any]:
    """The reply to one line."""
    try:
        from math_verify import verify

        expected = parsed(gold)
        if not expected:
            return {"error": "math-verify finds no mathematics in the gold answer"}
        return {"equal": bool(verify(expected, parsed(given), timeout_seconds=SECONDS))}
    except ImportError as error:
        return {"error": f"{error}; install vllm-score[processor]"}
    except Exception as error:  # sympy's, of any kind
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Only replies may go where the other side reads.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        json.dump(answer(*json.loads(line)), replies)
        replies.write("\n")
        replies.flush()


if __name__ == "__main__":
    main()
