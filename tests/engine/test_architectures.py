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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    run = subprocess.run(
        [sys.executable, str(SWEEP), "--families", *FAMILIES],
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
