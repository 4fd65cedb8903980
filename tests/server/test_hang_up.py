"""A client that hangs up takes its work out of the engine."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest

from tests.helpers import random_prompts
from tests.server.metrics import finished, unfinished

PROMPTS = random_prompts([1900] * 40, 1024, seed=9)  # seconds of work
SCORE: dict[str, Any] = {"score_mode": True}
ECHO: dict[str, Any] = {"echo": True, "max_tokens": 0, "logprobs": 1}
TOKEN: dict[str, Any] = {"echo": True, "max_tokens": 1, "logprobs": 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", [SCORE, ECHO, TOKEN], ids=str)
def test_the_rest_of_a_batch_is_not_computed(
    client: httpx.Client, fields: dict[str, Any], stream: bool
) -> None:
    before = finished(client)
    # Its own salt: nothing is cached already.
    body = {"model": "model", "prompt": PROMPTS, "cache_salt": f"{fields}{stream}", **fields}
    if stream:
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200  # known before the first prompt is scored
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=body, timeout=httpx.Timeout(120, read=0.5))
    while unfinished(client):
        time.sleep(0.05)
    assert finished(client) - before < len(PROMPTS)
    assert client.get("/health").status_code == 200
