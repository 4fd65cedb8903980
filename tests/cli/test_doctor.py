"""`vllm-score doctor` in a process of its own, as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    program = "from vllm.score.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "doctor", *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.engine
def test_every_process_reports_and_the_scores_are_right():
    from vllm.score.patches import REGISTER

    done = doctor("--json")
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["problem"] is None
    assert [p["role"] for p in report["processes"]] == ["front end", "engine core", "worker"]
    assert len({p["pid"] for p in report["processes"]}) == 3
    for process in report["processes"]:
        kernel = process["kernel"]
        assert kernel["name"] in ("native", "pytorch") and kernel["device"] and kernel["reason"]
    from vllm.score.ops.kernels import choose_kernel

    # The worker's answer is that of the loaded library, checked; here for the same device.
    worker = report["processes"][-1]["kernel"]
    if worker["device"] == "cpu":
        choice = choose_kernel("cpu")
        assert (worker["name"], worker["reason"]) == (choice.name, choice.reason)
    for process in report["processes"]:
        assert {p["state"] for p in process["patches"]} == {"applied"}
    seen = {p["target"] for process in report["processes"] for p in process["patches"]}
    assert seen == {patch.target for patch in REGISTER}
    assert report["check"]["max_difference_nats"] <= 2e-5


def test_refused_scores_are_exit_code_one():
    done = doctor("--quick", VLLM_PLUGINS="other")
    assert done.returncode == 1
    assert "VLLM_PLUGINS is 'other', which leaves out" in " ".join(done.stdout.split())
    assert "vllm-score doctor" not in done.stdout + done.stderr


def test_a_kernel_that_is_not_built_is_a_problem(monkeypatch):
    from vllm import SamplingParams  # noqa: F401 - arms this process
    from vllm.score.patches.engine_core import process_status

    assert process_status("front end")["problem"] is None
    for role in ("front end", "worker"):
        monkeypatch.setenv("VLLM_SCORE_KERNEL", "fast")
        assert "VLLM_SCORE_KERNEL='fast' names a kernel" in process_status(role)["problem"]
        monkeypatch.setenv("VLLM_SCORE_KERNEL", "pytorch")
        assert process_status(role)["kernel"]["name"] == "pytorch"
