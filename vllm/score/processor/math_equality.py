"""A process that answers whether two mathematical texts are equal; run as a script.

math-verify limits its time by signals, which work in a main thread only, and a power tower goes
past any limit. Here it has a main thread of its own, and whoever waits can end the process.

Its argument is the number of a pipe's descriptor, on which it gets (gold, answer) and gives back
whether they are equal, or a text that says why not.
"""

from __future__ import annotations

import re
import resource
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
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


def verdict(gold: str, answer: str) -> bool | str:
    """Whether they are equal, or why that cannot be said."""
    try:
        from math_verify import verify

        expected = parsed(gold)
        if not expected:
            return "math-verify finds no mathematics in the gold answer"
        return bool(verify(expected, parsed(answer), timeout_seconds=SECONDS))
    except ImportError as error:
        return f"{error}; install vllm-score[processor]"
    except Exception as error:  # sympy's, of any kind
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Answer until the other side closes the pipe."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    pipe = Connection(int(sys.argv[1]))
    with suppress(EOFError, OSError):
        while True:
            pipe.send(verdict(*pipe.recv()))


if __name__ == "__main__":
    main()
