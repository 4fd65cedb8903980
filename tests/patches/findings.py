"""What `scripts/import_order.py` must have found, wherever it ran."""

from __future__ import annotations

from typing import Any

from vllm.score.patches import REGISTER

COPY = {
    "same class": True,
    "score_mode": True,
    "max_tokens": 0,
    "score_statistics": ["entropy"],
    "score_temperature": 0.5,
}


def check_findings(found: dict[str, Any]) -> None:
    """Every patch is in place, and there is one class `SamplingParams`, which survives copies."""
    assert set(found["after first"].values()) <= {"applied"}, found["after first"]
    assert found["states"] == {patch.target: ["applied", ""] for patch in REGISTER}
    assert found["problems"] == [None, None, None]
    assert found["holders"] and all(found["holders"].values()), found["holders"]
    assert found["modules with the stock class"] == []
    assert found["copies"]
    for name, copy in found["copies"].items():
        assert copy == COPY, name
    assert found["ordinary"] is False
