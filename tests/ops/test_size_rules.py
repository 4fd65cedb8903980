"""The rules that choose between the fused kernel and the tiled product."""

from __future__ import annotations

import pytest

from vllm.score.ops.size_rules import (
    ALWAYS_FROM_ROWS,
    MEASURED,
    fused_ranges,
    multiplied_rows,
    prefers_fused,
    rules_in_words,
)


@pytest.mark.parametrize(
    ("rows", "multiplied"), [(1, 128), (128, 128), (129, 256), (256, 256), (257, 512), (8192, 8192)]
)
def test_rows_are_multiplied_in_whole_blocks(rows, multiplied):
    assert multiplied_rows(rows) == multiplied


@pytest.mark.parametrize(("hidden", "vocabulary"), MEASURED)
def test_the_rules_follow_the_measurements(hidden, vocabulary):
    """Chosen, the fused kernel was at most 5 % slower; not chosen, at most 20 % faster."""
    for rows, speed in MEASURED[hidden, vocabulary].items():
        if prefers_fused(rows, hidden):
            assert speed > 0.95, (rows, speed)
        else:
            assert speed < 1.2, (rows, speed)


def test_ranges_say_what_the_rule_does():
    for hidden in (64, 1536, 1537, 8192):
        ranges = fused_ranges(hidden)
        for rows in (*range(1, ALWAYS_FROM_ROWS + 50), 10**6):
            inside = any(first <= rows and (last is None or rows <= last) for first, last in ranges)
            assert inside == prefers_fused(rows, hidden)


def test_words_name_every_rule():
    small, large = rules_in_words()
    assert small.startswith("hidden size up to 1536") and large.startswith("hidden size above 1536")
