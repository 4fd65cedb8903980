"""Families unlike those of test_exactness.py, by the sweep that makes ARCHITECTURES.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SWEEP = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
# Soft caps and a window; logit scale and a parallel block; sinks and experts; latent attention; a
# recurrent state beside attention.
FAMILIES = ["gemma2", "cohere", "gpt_oss", "deepseek_v2 torch rotary", "falcon_h1"]
TOLERANCE = 1e-4  # nats
# Prompts attend forwards, too; queries that vLLM rotates wrongly on a CPU.
REFUSED, WARNED, CURED = "hrm_text", "lfm2", "lfm2 torch rotary"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    run = subprocess.run(
        [sys.executable, str(SWEEP), "--families", *FAMILIES, REFUSED, WARNED, CURED],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("architectures"),
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {row["family"]: row for row in json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_hugging_faces_in_float64(family, rows):
    row = rows[family]
    assert "error" not in row, row
    assert row["reference"] == "float64"
    assert row["ours"] <= TOLERANCE


def test_a_model_that_is_not_causal_is_refused(rows):
    row = rows[REFUSED]
    assert row["step"] == "the scores" and row["error"].startswith("ScoreModeUnavailable")
    assert "the tokens of a prompt see those behind them" in row["error"]


def test_what_vllm_computes_wrongly_is_said_with_a_cure_that_works(rows):
    (warning,) = rows[WARNED]["warnings"]
    assert "vLLM's rotary embedding on a CPU is wrong" in warning
    assert "custom_ops': ['-rotary_embedding']" in warning
    assert rows[WARNED]["ours"] > 0.1
    for family in (CURED, *FAMILIES):
        assert rows[family]["warnings"] == [], family
    assert rows[CURED]["ours"] <= TOLERANCE
