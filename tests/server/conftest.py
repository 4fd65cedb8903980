"""One server for all tests of this folder: starting it takes half a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks.server_process import running_server

OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"),
    *("--max-num-batched-tokens", "256", "--max-num-seqs", "64", "--block-size", "32"),
    "--enable-prompt-tokens-details",
)
# A small cache, and the worker in the engine's process: a process less to start. The engine is one
# of its own whatever the variable says, but the CPU platform wants it for this executor.
CPU_OPTIONS = (
    *("--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(128 << 20)),
    *("--distributed-executor-backend", "uni"),
)
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Several servers run at a time.
GPU_OPTIONS = ("--gpu-memory-utilization", "0.2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs an engine."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory, model_dir: Callable[..., Path]) -> Any:
    """`serve(*options, **environment)`: context manager of a server's address."""

    def start(*options: str, **environment: str) -> Any:
        options = (*OPTIONS, *options)
        if torch.cuda.is_available():
            options = (*options, *GPU_OPTIONS)
        else:
            options, environment = (*options, *CPU_OPTIONS), environment | CPU_ENVIRONMENT
        log = tmp_path_factory.mktemp("server") / "log"
        return running_server(model_dir("llama"), *options, log=log, **environment)

    return start


@pytest.fixture(scope="session", autouse=True)
def starting(serve: Any) -> Iterator[Future[str]]:
    """The address, once the server of this session is up; other things may start meanwhile."""
    running = serve()
    with ThreadPoolExecutor(1) as executor:
        future = executor.submit(running.__enter__)
        yield future
        if future.exception() is None:
            running.__exit__(None, None, None)


@pytest.fixture(scope="session")
def server(starting: Future[str]) -> str:
    """Address of a server that stays up for the whole session."""
    return starting.result()


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="session")
def complete(client: httpx.Client) -> Callable[..., Any]:
    """`complete(**body)`: the answer to a completion request, which must be a success."""

    def post(**body: Any) -> Any:
        response = client.post("/v1/completions", json={"model": "model", **body})
        assert response.status_code == 200, response.text
        return response.json()

    return post


@pytest.fixture(scope="session")
def refused(client: httpx.Client) -> Callable[..., str]:
    """`refused(**body)`: the message of a request that must be answered with status 400."""

    def post(**body: Any) -> str:
        response = client.post("/v1/completions", json={"model": "model", **body})
        assert response.status_code == 400, response.text
        message: str = response.json()["error"]["message"]
        return message

    return post


@pytest.fixture(scope="session")
def events(client: httpx.Client) -> Callable[..., list[Any]]:
    """`events(**body)`: what a streamed completion sends, without its last line."""
    import json

    def post(**body: Any) -> list[Any]:
        body = {"model": "model", "stream": True, **body}
        response = client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        lines = [x for x in response.text.splitlines() if x]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    return post
