"""From which sizes the fused kernel of compute capability 9.0 beats the tiled product.

The fused kernel multiplies 256 rows at a time (128, where there are no more), whether all of them
exist or not, so what decides is the share of its rows that do. Where the hidden size is small the
tiled product spends much of its time on writing and reading logits, so a smaller share is enough.
Measured on one H200 with bfloat16 and random operands: `MEASURED`, the note
benchmarks/notes/fused_head_sm90.md, and ``benchmarks/head_kernel.py --sizes``.
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_ROWS, PAIR_ROWS = 128, 256
# With fewer rows reading the weights takes all the time, and cuBLAS reads them faster.
LEAST_ROWS = 64
# From here on so few rows are missing that the fused kernel always serves.
ALWAYS_FROM_ROWS = 1024


@dataclass(frozen=True)
class SizeRule:
    """Up to `max_hidden`: the least share of the rows multiplied that must exist."""

    max_hidden: int | None
    least_share: float


# For more than BLOCK_ROWS rows.
SIZE_RULES = (SizeRule(1536, 0.6), SizeRule(None, 0.8))

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


def multiplied_rows(rows: int) -> int:
    """The rows that the fused kernel multiplies for `rows` rows."""
    block = BLOCK_ROWS if rows <= BLOCK_ROWS else PAIR_ROWS
    return -(-rows // block) * block


def least_share(hidden_size: int) -> float:
    """The share of the rows multiplied that must exist, by `SIZE_RULES`."""
    for rule in SIZE_RULES:
        if rule.max_hidden is None or hidden_size <= rule.max_hidden:
            return rule.least_share
    raise AssertionError("the last rule has no limit")


def prefers_fused(rows: int, hidden_size: int) -> bool:
    """Whether the fused kernel should be the faster one: hidden states [rows, hidden_size]."""
    if rows <= BLOCK_ROWS or rows >= ALWAYS_FROM_ROWS:
        return rows >= LEAST_ROWS
    return rows >= least_share(hidden_size) * multiplied_rows(rows)


def fused_ranges(hidden_size: int) -> list[tuple[int, int | None]]:
    """The numbers of rows, (first, last) with None for no end, that the fused kernel serves."""
    ranges: list[tuple[int, int | None]] = []
    first: int | None = None
    for rows in range(1, ALWAYS_FROM_ROWS + 1):
        if prefers_fused(rows, hidden_size):
            first = rows if first is None else first
        elif first is not None:
            ranges.append((first, rows - 1))
            first = None
    ranges.append((ALWAYS_FROM_ROWS if first is None else first, None))
    return ranges


def rules_in_words() -> list[str]:
    """One line a rule, for people."""
    lines, smaller = [], 0
    for rule in SIZE_RULES:
        limit = f"up to {rule.max_hidden}" if rule.max_hidden else f"above {smaller}"
        rows = ", ".join(
            f"from {first}" if last is None else f"{first}..{last}"
            for first, last in fused_ranges(rule.max_hidden or smaller + 1)
        )
        lines.append(f"hidden size {limit}: fused for {rows} rows, else tiled")
        smaller = rule.max_hidden or smaller
    return lines
