"""A store part for tests; run as a program it writes parts without end."""

from __future__ import annotations

import sys
from functools import cache

import pyarrow as pa

from vllm.score.perplexity.store import UNKNOWN, Store, part_schema

FINGERPRINT = {"model": {"name": "a"}, "settings": {"stride": 4, "plan": (1, 2)}, "text": UNKNOWN}
LARGE = 5_000
NUMBERS = 20


@cache
def part(first: int = 0, rows: int = 3) -> pa.Table:
    columns = [range(first, first + rows), range(rows), ["é"] * rows, [-1.5] * rows, [0] * rows]
    schema = part_schema()
    return pa.table(
        [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
    )


def write_without_end(directory: str) -> None:
    """Write parts 0 to NUMBERS - 1 again and again; a line on standard output after each."""
    store = Store.open(directory, FINGERPRINT, resume=True)
    count = 0
    while True:
        number = count % NUMBERS
        store.write("plan", number, str(number), part(number, rows=LARGE))
        print(count, flush=True)
        count += 1


if __name__ == "__main__":
    write_without_end(sys.argv[1])
