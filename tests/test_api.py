"""The order in which requests are sent, and what the engine is sent before it begins."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.api import SHARED_TOKENS, common_prefix, shared_prefix_order

# Few different ids, so that prefixes of every length are shared.
IDS = st.lists(st.integers(0, 2), max_size=12)
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=2 * SHARED_TOKENS), max_size=40)


def order_of(prompts):
    return shared_prefix_order([np.array(p, dtype=np.int32) for p in prompts])


@given(PROMPTS)
def test_every_shared_prefix_is_visited_once(prompts):
    """Whoever shares a prefix of that length follows each other, for every length."""
    order = order_of(prompts)
    assert sorted(order) == list(range(len(prompts)))
    for length in range(SHARED_TOKENS, 2 * SHARED_TOKENS + 1):
        visited = [tuple(prompts[i][:length]) for i in order if len(prompts[i]) >= length]
        runs = [p for i, p in enumerate(visited) if i == 0 or visited[i - 1] != p]
        assert len(runs) == len(set(runs))


@given(PROMPTS)
def test_groups_stay_in_the_order_of_their_first_members(prompts):
    order = order_of(prompts)
    firsts: dict[tuple[int, ...], int] = {}
    for i in order:
        key = tuple(prompts[i][:SHARED_TOKENS]) if len(prompts[i]) >= SHARED_TOKENS else (-1, i)
        firsts[key] = min(firsts.get(key, i), i)
    assert list(firsts.values()) == sorted(firsts.values())


@given(st.permutations(range(30)))
def test_nothing_shared_nothing_moved(first_ids):
    prompts = [[i] + [7] * 40 for i in first_ids]
    assert order_of(prompts) == list(range(30))


def test_ids_above_two_bytes_sort_as_numbers():
    """Neighbours by value, not by their bytes in memory."""
    shared = [3] * SHARED_TOKENS
    prompts = [[*shared, i] for i in (70_000, 255, 256, 1, 65_536)]
    assert order_of(prompts) == [3, 1, 2, 4, 0]


@given(IDS, IDS)
def test_common_prefix(a, b):
    found = common_prefix(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64))
    assert a[:found] == b[:found]
    assert a[: found + 1] != b[: found + 1] or found == min(len(a), len(b))
