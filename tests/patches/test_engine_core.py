"""Fail closed: whatever is wrong behind the front end, scores are refused and the rest runs on."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import token_logprobs
from tests.patches.processes import run_script
from tests.patches.scripts.engines import SCORED
from vllm.score.armed import upstream_version
from vllm.score.patches import REGISTER

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TOLERANCE = 2e-5
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


@pytest.fixture(scope="module")
def found(pool: ThreadPoolExecutor, model_dir: Callable[..., Path]) -> Callable[[str], Any]:
    model = model_dir("llama")
    script = "engine_processes.py"
    contracts = json.dumps({patch.target: list(patch.contract) for patch in REGISTER})
    running: dict[str, Future[Any]] = {
        "without us": pool.submit(run_script, script, model, "without us", **PROCESSES),
        "with us": pool.submit(run_script, script, model, "with us", **PROCESSES),
        "broken": pool.submit(run_script, "broken_contract.py", model, **IN_PROCESS),
        "altered": pool.submit(run_script, "altered.py", model, contracts, **IN_PROCESS),
    }
    return lambda name: running[name].result()


def is_one_sentence(message: str) -> bool:
    return message.endswith(".") and "\n" not in message


def test_an_engine_core_without_us_refuses_scores(found: Callable[[str], Any]) -> None:
    attempts = found("without us")["attempts"]
    assert len(attempts) == 3  # the first refusal must not be remembered as a check that passed
    for kind, message in attempts:
        assert kind == "ScoreModeUnavailable"
        assert "engine core" in message and "set VLLM_PLUGINS there as here" in message
        assert is_one_sentence(message)


def test_an_engine_core_without_us_goes_on_generating(found: Callable[[str], Any]) -> None:
    without, healthy = found("without us"), found("with us")
    assert without["front end"] is None
    assert not without["unfinished"]
    before, after = without["generated"]
    assert before == after == healthy["generated"][0]


def test_processes_that_arm_themselves_score(
    found: Callable[[str], Any], reference: Callable[..., np.ndarray]
) -> None:
    expected = token_logprobs(reference("llama", SCORED), SCORED)
    attempts = found("with us")["attempts"]
    assert len(attempts) == 3
    for kind, logprobs in attempts:
        assert kind == "scores", logprobs
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=TOLERANCE)


def test_reasoning_is_refused_where_scores_are(found: Callable[[str], Any]) -> None:
    """A decision that fails is a stop; an engine that cannot score is an error."""
    kind, message = found("without us")["reasoning"]
    assert kind == "ScoreModeUnavailable" and "engine core" in message
    kind, logprobs = found("with us")["reasoning"]
    assert kind == "scores" and len(logprobs) == 2


def test_processes_that_arm_themselves_say_so(found: Callable[[str], Any]) -> None:
    healthy = found("with us")
    statuses = healthy["processes"]
    assert [status["role"] for status in statuses] == ["engine core", "worker"]
    pids = {status["pid"] for status in statuses}
    assert len(pids) == 2 and healthy["front end pid"] not in pids
    for status in statuses:
        assert status["problem"] is None
        assert {patch["state"] for patch in status["patches"]} <= {"applied", "not imported"}
    assert all(p["state"] == "applied" for p in statuses[0]["patches"])


def test_a_changed_engine_core_is_named(found: Callable[[str], Any]) -> None:
    states = found("broken")["states"]
    state, reason = states["vllm.v1.core.kv_cache_manager"]
    assert state == "failed"
    assert "KVCacheManager.get_computed_blocks" in reason and "queried" in reason
    state, reason = states["vllm.v1.core.sched.scheduler"]
    assert (state, reason) == (
        "failed",
        "Scheduler._update_request_with_output does not exist",
    )
    others = set(states) - {"vllm.v1.core.kv_cache_manager", "vllm.v1.core.sched.scheduler"}
    assert others and "failed" not in {states[target][0] for target in others}


def test_a_changed_engine_core_is_a_problem_of_that_process_only(
    found: Callable[[str], Any],
) -> None:
    problems = found("broken")["problems"]
    assert problems["front end"] is None and problems["worker"] is None
    assert is_one_sentence(problems["engine core"])
    for word in (
        "engine core",
        "vllm.v1.core.kv_cache_manager",
        f"vLLM {upstream_version()}",
        "VLLM_PLUGINS=vllm_score",
    ):
        assert word in problems["engine core"]


def test_a_changed_engine_core_refuses_scores_and_generates(
    found: Callable[[str], Any],
) -> None:
    broken = found("broken")
    assert len(broken["attempts"]) == 3
    for attempt in broken["attempts"]:
        assert attempt == ["ScoreModeUnavailable", broken["problems"]["engine core"]]
    assert not broken["unfinished"]
    tokens = found("with us")["generated"][0]
    assert broken["generated"] == [tokens, tokens]
    assert broken["undone"]["generated"] == tokens


def test_what_another_plug_in_undoes_is_found(found: Callable[[str], Any]) -> None:
    undone = found("broken")["undone"]
    for role, target, name in (
        ("worker", "vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens"),
        ("front end", "vllm.v1.engine.input_processor", "InputProcessor.process_inputs"),
    ):
        state, reason = undone["states"][target]
        assert state == "failed" and name in reason
        assert target in undone["problems"][role]
    assert undone["attempt"] == ["ScoreModeUnavailable", undone["problems"]["front end"]]
    assert undone["class"] == ["failed", "the amendment is not in place"]


def test_a_release_that_changed_everywhere_generates_and_refuses(
    found: Callable[[str], Any],
) -> None:
    altered = found("altered")
    in_use = {t: s for t, s in altered["states"].items() if s[0] != "not imported"}
    assert len(in_use) >= 12
    for target, (state, reason) in in_use.items():
        assert state == "failed" and "takes (more" in reason, target
    assert all(is_one_sentence(problem) for problem in altered["problems"].values())
    for kind, message in altered["attempts"]:
        assert kind == "ScoreModeUnavailable" and message == altered["problems"]["front end"]
    tokens = found("with us")["generated"][0]
    assert altered["generated"] == [tokens, tokens]
