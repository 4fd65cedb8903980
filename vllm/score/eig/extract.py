"""Answers in a text: numbers, boxes of LaTeX, and what a pattern finds."""

from __future__ import annotations

import re
from typing import NamedTuple

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus between two numbers is a difference, and "1/2/2026" is no fraction.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![)\]}}])(?P<sign>[-−]))?\\?\$?"
    rf"(?P<digits>(?<!/)[0-9]+/[0-9]+(?![0-9/])|(?:{_PLAIN})(?:[eE][-+]?[0-9]+)?)"
)
_DECIMAL = re.compile(r"(?P<sign>[-−]?)(?P<whole>[0-9]*)(?:\.(?P<part>[0-9]+))?")
_THOUSANDS = re.compile(r"[-−]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


class Found(NamedTuple):
    """An answer in a text.

    Attributes:
        answer: normalised.
        end: the position behind it.
        open: it may go on if the text does.
    """

    answer: str
    end: int
    open: bool


def normalise(text: str) -> str:
    """One text for answers that differ in their writing only.

    Blanks at the ends, runs of blanks, and dollar signs around it are dropped. A decimal number
    also loses commas between thousands, zeros that say nothing, a full stop and a percent sign
    behind it: " $1,000.0 " is "1000".
    """
    text = " ".join(text.split())
    bare = text
    while (stripped := bare.removeprefix("\\$").removesuffix("\\$").strip("$ ")) != bare:
        bare = stripped
    number = bare.removesuffix(".").removesuffix("%").removesuffix("\\").rstrip()
    if _THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    match = _DECIMAL.fullmatch(number)
    if not match or not (match["whole"] or match["part"]):
        return bare
    whole, part = match["whole"].lstrip("0") or "0", (match["part"] or "").rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return f"-{value}" if match["sign"] and value != "0" else value


def find_numbers(text: str) -> list[Found]:
    """The numbers in a text, in order.

    Integers, decimals ("3.5", ".5", but the full stop of "3." is none), thousands with commas,
    fractions of integers ("1/2", not reduced) and powers of ten ("1e5"), with a minus where it
    does not stand between numbers ("7-5" has 7 and 5). Percent and dollar signs are left out.
    Digits within a word, as in "x2", are none.
    """
    # A number goes on behind digits, and so it may behind a point, a comma or a bar.
    settled = len(text.rstrip("0123456789.,/eE+-"))
    return [
        Found(
            normalise(("-" if match["sign"] else "") + match["digits"]),
            match.end(),
            match.end() >= settled,
        )
        for match in _NUMBER.finditer(text)
    ]


def find_boxed(text: str) -> list[Found]:
    r"""What stands in \boxed{...} (or \fbox{...}), in order.

    Braces within must be balanced (\{ and \} are characters). Of boxes in a box the inner ones
    count. Empty and unclosed boxes are left out.
    """
    found = []
    for box in _BOX.finditer(text):
        end = _closing_brace(text, box.end())
        if end is None or _BOX.search(text, box.end(), end):
            continue
        if answer := normalise(text[box.end() : end]):
            found.append(Found(answer, end + 1, False))
    return found


def find_pattern(text: str, pattern: re.Pattern[str]) -> list[Found]:
    """What a pattern finds, normalised: its first group, or all where it has none."""
    found = []
    for match in pattern.finditer(text):
        answer = normalise(match[1 if pattern.groups else 0] or "")
        if answer:
            found.append(Found(answer, match.end(), match.end() == len(text)))
    return found


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return None
