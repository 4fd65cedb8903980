"""Scripts that look at vLLM from outside, two at a time: importing it keeps a core busy."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

AT_ONCE = 2


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for scripts."""
    executor = ThreadPoolExecutor(AT_ONCE)
    yield executor
    executor.shutdown(cancel_futures=True)
