"""Run a script of `scripts/` in an interpreter of its own, and read what it found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT_SECONDS = 240
# What the tests of the rest set for their own process; a script must find a user's environment.
NOT_INHERITED = ("VLLM_PLUGINS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD")


def run_script(
    name: str,
    *arguments: object,
    python: str | Path = sys.executable,
    **environment: str,
) -> Any:
    """The JSON that the script prints last; `environment` is added to ours.

    Raises:
        AssertionError: the script failed; with its output.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    process = subprocess.Popen(
        [str(python), str(SCRIPTS / name), *map(str, arguments)],
        env=inherited | environment,
        cwd=SCRIPTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the script and the engine processes it started
        out, err = process.communicate()
    assert process.returncode == 0, f"{name} {arguments}: {process.returncode}\n{out}\n{err}"
    return json.loads(out.splitlines()[-1])
