"""What the engine is sent before it begins."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.score.engine.feed import common_prefix

IDS = st.lists(st.integers(0, 2), max_size=12)


@given(IDS, IDS)
def test_common_prefix(a, b):
    found = common_prefix(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64))
    assert a[:found] == b[:found]
    assert a[: found + 1] != b[: found + 1] or found == min(len(a), len(b))
