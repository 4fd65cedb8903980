"""What the tests of the processor share."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def warnings_reach_pytest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a vLLM that was imported before has made of its loggers."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    ours = logging.getLogger("vllm.score")
    before = ours.level
    ours.setLevel(logging.WARNING)
    yield
    ours.setLevel(before)
