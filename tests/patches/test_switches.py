"""Switched off, or beside a vLLM that it was not written for: stock vLLM, and no silent score."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.patches.processes import run_script
from vllm.score.patches.register import REGISTER

pytestmark = pytest.mark.timeout(600)

RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "off": ((), {"VLLM_PLUGINS": ""}),
    "others only": ((), {"VLLM_PLUGINS": "some_other"}),
    "ours only": ((), {"VLLM_PLUGINS": "vllm_score"}),
    "later vLLM": (("0.33.0",), {}),
}


@pytest.fixture(scope="module")
def found(pool: ThreadPoolExecutor) -> dict[str, Any]:
    running = {
        name: pool.submit(run_script, "switches.py", *arguments, **environment)
        for name, (arguments, environment) in RUNS.items()
    }
    return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("run", ["off", "others only"])
def test_without_the_plug_in_vllm_is_stock(run: str, found: dict[str, Any]) -> None:
    assert not found[run]["armed"]
    for attempt in ("constructor", "from_optional"):
        kind, message = found[run][attempt]
        assert kind == "TypeError" and "unexpected keyword argument" in message.lower()
        assert "score_mode" in message


@pytest.mark.parametrize("run", ["off", "others only"])
def test_without_the_plug_in_score_names_the_switch(run: str, found: dict[str, Any]) -> None:
    kind, message = found[run]["score"]
    assert kind == "ScoreModeUnavailable"
    for word in ("'vllm_score'", "VLLM_PLUGINS", "0.32.", "`vllm-score doctor`"):
        assert word in message


def test_naming_the_plug_in_switches_it_on(found: dict[str, Any]) -> None:
    ours = found["ours only"]
    assert ours["states"] == {patch.target: ["applied", ""] for patch in REGISTER}
    assert ours["problem"] is None
    assert ours["constructor"] == ["SamplingParams"]
    assert ours["from_optional"] == ["SamplingParams"]


def test_the_contracts_hold_in_the_untouched_release(found: dict[str, Any]) -> None:
    assert found["off"]["contracts"] == {patch.target: None for patch in REGISTER}


@pytest.mark.parametrize("run", ["others only", "ours only", "later vLLM"])
def test_ordinary_parameters_are_the_same_bytes_on_the_wire(
    run: str, found: dict[str, Any]
) -> None:
    assert found["off"]["ordinary"]
    assert found[run]["ordinary"] == found["off"]["ordinary"]


def test_another_vllm_is_not_amended(found: dict[str, Any]) -> None:
    states = found["later vLLM"]["states"]
    assert states == {p.target: ["failed", "written for vLLM 0.32.*"] for p in REGISTER}


@pytest.mark.parametrize("attempt", ["constructor", "from_optional", "score"])
def test_another_vllm_refuses_scores_in_one_sentence(attempt: str, found: dict[str, Any]) -> None:
    kind, message = found["later vLLM"][attempt]
    assert kind == "ScoreModeUnavailable"
    for word in ("vllm.sampling_params", "vLLM 0.33.0", "0.32.*", "`vllm-score doctor`"):
        assert word in message
    assert message.endswith(".") and "\n" not in message
