"""The rules that choose between the fused kernel and the tiled product."""

from __future__ import annotations

import math
import re

import pytest

from vllm.score.ops.kernels import head_rule, prefers_fused

# Of one H200, bfloat16 and random operands (benchmarks/head_kernel.py --sizes):
# (hidden size, vocabulary): rows -> speed of the fused kernel as a multiple of the tiled product's.
MEASURED: dict[tuple[int, int], dict[int, float]] = {
    (1024, 151_936): {32: 1.01, 64: 1.25, 96: 1.38, 128: 1.47, 144: 1.17, 192: 1.40, 256: 1.69,
                      260: 0.97, 320: 1.05, 352: 1.25, 448: 1.63, 512: 1.60, 520: 1.11, 640: 1.42,
                      780: 1.37, 1030: 1.48, 2048: 1.58, 8192: 1.53},
    (2048, 32_768): {32: 0.91, 64: 1.02, 96: 1.09, 128: 1.13, 144: 0.92, 192: 1.04, 256: 1.18,
                     260: 0.71, 320: 0.84, 352: 0.96, 448: 1.23, 512: 1.29, 520: 0.91, 640: 1.11,
                     780: 1.00, 1030: 1.11, 2048: 1.28, 8192: 1.32},
    (4096, 128_256): {32: 0.93, 64: 1.12, 96: 1.19, 128: 1.22, 144: 0.83, 192: 1.06, 256: 1.16,
                      260: 0.64, 320: 0.76, 352: 0.91, 448: 1.17, 512: 1.17, 520: 0.93, 640: 1.07,
                      780: 0.93, 1030: 1.03, 2048: 1.21},
    (5120, 32_000): {32: 0.88, 64: 1.04, 96: 1.05, 128: 1.08, 144: 0.83, 192: 0.93, 256: 1.07,
                     260: 0.57, 320: 0.71, 352: 0.85, 448: 1.06, 512: 1.14, 520: 0.80, 640: 0.98,
                     780: 0.88, 1030: 0.96, 2048: 1.09, 8192: 1.17},
}  # fmt: skip


@pytest.mark.parametrize(("hidden", "vocabulary"), MEASURED)
def test_the_rules_follow_the_measurements(hidden, vocabulary):
    """Chosen, the fused kernel was at most 5 % slower; not chosen, at most 20 % faster."""
    for rows, speed in MEASURED[hidden, vocabulary].items():
        if prefers_fused(rows, hidden):
            assert speed > 0.95, (rows, speed)
        else:
            assert speed < 1.2, (rows, speed)


def test_words_name_every_rule():
    """The rule by the numbers in the words is the rule, for any number of rows."""
    words = head_rule("cuda")
    found = re.search(
        r"for (\d+)\.\.(\d+) rows, from (\d+), .* fill (\d+)% \(hidden size up to (\d+)\) or "
        r"(\d+)% \(above\) of their blocks of (\d+);",
        words,
    )
    assert found is not None, words
    least, first_block, always, small_share, small, large_share, block = map(int, found.groups())
    for hidden in (64, small, small + 1, 8192):
        percent = small_share if hidden <= small else large_share
        for rows in (*range(1, always + 50), 10**6):
            blocks = math.ceil(rows / block)
            fused = least <= rows <= first_block or rows >= always
            fused |= first_block < rows < always and 100 * rows >= percent * blocks * block
            assert prefers_fused(rows, hidden) == fused, (rows, hidden)
