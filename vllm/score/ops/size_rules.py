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
# From here on so few rows are missing that the fused kernel always serves.
ALWAYS_FROM_ROWS = 1024


@dataclass(frozen=True)
class SizeRule:
    """Up to `max_hidden`: the least share of the rows multiplied that must exist."""

    max_hidden: int | None
    least_share: float


SIZE_RULES = (SizeRule(1536, 0.65), SizeRule(None, 0.78))

# (hidden size, vocabulary): rows -> speed of the fused kernel as a multiple of the tiled product's.
MEASURED: dict[tuple[int, int], dict[int, float]] = {
    (1024, 151_936): {32: 0.92, 64: 1.04, 96: 1.24, 128: 1.35, 144: 1.16, 192: 1.32, 256: 1.64,
                      260: 0.72, 320: 0.96, 352: 1.20, 448: 1.58, 520: 1.10, 640: 1.38, 1030: 1.42,
                      2048: 1.53, 8192: 1.52},
    (2048, 32_768): {32: 0.94, 80: 0.96, 96: 1.05, 128: 1.11, 144: 0.89, 192: 1.01, 256: 1.15,
                     260: 0.56, 384: 0.98, 448: 1.19, 520: 0.93, 640: 1.09, 1030: 1.10, 2048: 1.23,
                     8192: 1.29},
    (4096, 128_256): {32: 0.94, 64: 1.04, 96: 1.05, 128: 1.14, 144: 0.84, 192: 1.00, 256: 1.12,
                      260: 0.65, 384: 0.92, 448: 1.05, 520: 0.94, 640: 1.05, 1030: 1.03,
                      2048: 1.18},
    (5120, 32_000): {32: 0.84, 64: 0.90, 96: 0.98, 128: 1.01, 144: 0.78, 192: 0.87, 256: 1.05,
                     260: 0.59, 384: 0.89, 448: 1.06, 520: 0.80, 640: 0.96, 1030: 0.96, 2048: 1.09,
                     8192: 1.18},
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
    if rows >= ALWAYS_FROM_ROWS:
        return True
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
