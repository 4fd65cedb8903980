"""Switched off, or beside a vLLM that it was not written for: stock vLLM, and no silent score."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.patches.processes import run_script
from vllm.score.patches import REGISTER

pytestmark = pytest.mark.timeout(600)

RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "off": ((), {"VLLM_PLUGINS": ""}),
    "others only": ((), {"VLLM_PLUGINS": "some_other"}),
    # What the refusals of "off" and "others only" advise.
    "ours only": ((), {"VLLM_PLUGINS": "vllm_score,vllm_score_check"}),
    "ours, too": ((), {"VLLM_PLUGINS": "some_other,vllm_score,vllm_score_check"}),
    "CPU target": ((), {"VLLM_TARGET_DEVICE": "cpu"}),
    "later vLLM": (("0.34.0",), {}),
    "later vLLM, tried": (("0.34.0",), {"VLLM_SCORE_ANY_VERSION": "1"}),
}


@pytest.fixture(scope="module")
def found(pool: ThreadPoolExecutor) -> dict[str, Any]:
    running = {
        name: pool.submit(run_script, "switches.py", *arguments, **environment)
        for name, (arguments, environment) in RUNS.items()
    }
    return {name: future.result() for name, future in running.items()}


@pytest.mark.parametrize("run", ["off", "others only", "CPU target"])
def test_without_the_plug_in_vllm_is_stock(run: str, found: dict[str, Any]) -> None:
    assert not found[run]["armed"]
    for attempt in ("constructor", "from_optional"):
        kind, message = found[run][attempt]
        assert kind == "TypeError" and "unexpected keyword argument" in message.lower()
        assert "score_mode" in message


@pytest.mark.parametrize(
    ("run", "cause", "cure"),
    [
        ("off", "VLLM_PLUGINS is '', which leaves out", "unset it, or set it to {ours only}"),
        ("others only", "VLLM_PLUGINS is 'some_other'", "unset it, or set it to {ours, too}"),
        ("CPU target", "VLLM_TARGET_DEVICE is 'cpu'", "unset it"),
    ],
)
def test_without_the_plug_in_score_names_cause_and_cure(
    run: str, cause: str, cure: str, found: dict[str, Any]
) -> None:
    values = {name: repr(variables.get("VLLM_PLUGINS")) for name, (_, variables) in RUNS.items()}
    kind, message = found[run]["score"]
    assert kind == "ScoreModeUnavailable" and message == found[run]["problem"]
    assert cause in message and cure.format_map(values) in message
    assert message.endswith(".") and "\n" not in message and "doctor" not in message


def test_an_installation_without_plug_in_or_with_a_broken_one_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from vllm.score.armed import why_not_armed

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_TARGET_DEVICE", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert "name no plugin 'vllm_score'" in why_not_armed()
    folder = tmp_path / "vllm_score-0.1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: vllm-score\nVersion: 0.1.0\n")
    (folder / "entry_points.txt").write_text("[vllm.platform_plugins]\nvllm_score = nowhere:arm\n")
    assert "'nowhere:arm' cannot be loaded (ModuleNotFoundError" in why_not_armed()


@pytest.mark.parametrize("run", ["ours only", "ours, too"])
def test_naming_the_plug_in_switches_it_on(run: str, found: dict[str, Any]) -> None:
    ours = found[run]
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
    assert states == {p.target: ["failed", "written for vLLM 0.31 to 0.33"] for p in REGISTER}


@pytest.mark.parametrize("attempt", ["constructor", "from_optional", "score"])
def test_another_vllm_refuses_scores_in_one_sentence(attempt: str, found: dict[str, Any]) -> None:
    kind, message = found["later vLLM"][attempt]
    assert kind == "ScoreModeUnavailable"
    cure = "`pip install 'vllm>=0.31,<0.34'`"
    for word in ("vllm.sampling_params", "vLLM 0.34.0", "0.31 to 0.33", cure):
        assert word in message
    assert message.endswith(".") and "\n" not in message


def test_a_brave_user_is_warned(found: dict[str, Any]) -> None:
    ours = found["later vLLM, tried"]
    assert ours["states"] == {patch.target: ["applied", ""] for patch in REGISTER}
    assert ours["problem"] is None and ours["constructor"] == ["SamplingParams"]
    (warning,) = ours["warnings"]
    assert "tested with vLLM 0.31 to 0.33, not with 0.34.0" in warning
    assert found["ours only"]["warnings"] == []
