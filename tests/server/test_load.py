"""Many clients at once: every answer right, none lost, the server idle and alive after them."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import torch

from benchmarks.load_requests import MIX, make_requests
from benchmarks.server_load import finish, load, problems


def test_mixed_load(server: str, reference: Any) -> None:
    requests = make_requests(60, vocab_size=1024, longest=600)
    assert set(Counter(r.kind for r in requests).values()) == {60 // len(MIX)}
    answers = asyncio.run(load(server, requests))
    last = make_requests(len(MIX), vocab_size=1024, longest=600, seed=2)
    answers += asyncio.run(finish(server, last))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so short that waiting for each other would take longest
    found = problems([*requests, *last], answers, partial(reference, "llama"))
    torch.set_num_threads(threads)
    assert found == []
    assert any(a.status == 0 for a in answers)  # somebody did hang up
