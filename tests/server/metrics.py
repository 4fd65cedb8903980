"""What the server says about itself."""

from __future__ import annotations

import re

import httpx


def finished(client: httpx.Client) -> float:
    """Requests that the engine has finished since it started."""
    return _total(client, "request_success_total")


def unfinished(client: httpx.Client) -> float:
    """Requests in the engine."""
    return _total(client, "num_requests_running") + _total(client, "num_requests_waiting")


def _total(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    return sum(map(float, re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)))
