"""A hybrid model (linear attention with a recurrent state, full attention, experts) in bfloat16.

vLLM keeps the recurrent state of such a model at the boundaries of large blocks, and cuts cached
prefixes there; the first scored row limits them as it does everywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.score_hybrid import CONTEXT

pytestmark = pytest.mark.engine

# The parts of a mean over some tokens that bfloat16 and its choices of experts move, in nats.
BFLOAT16_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.importorskip("flashinfer", reason="vLLM runs this model with it on a GPU")
    folder = tmp_path_factory.mktemp("hybrid")
    program, out = Path(__file__).with_name("score_hybrid.py"), folder / "out.json"
    run = subprocess.run(
        [sys.executable, str(program), str(folder / "model"), str(out)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(out.read_text())


def test_the_context_is_computed_once(found):
    block = found["block"]
    assert block < CONTEXT - 1, "this test needs hits to mean anything"
    hit = (CONTEXT - 1) // block * block
    assert found["cached"] == [[0, hit, hit, hit], [hit] * 4]


def test_cached_states_give_the_same_scores(found):
    for scores in found["scores"]:
        for cached, alone in zip(scores, found["alone"], strict=True):
            np.testing.assert_allclose(cached, alone, atol=1e-5)


def test_scores_are_hugging_faces_within_bfloat16(found):
    for scores, want in zip(found["alone"], found["reference"], strict=True):
        assert np.abs(np.array(scores) - want).mean() < BFLOAT16_TOLERANCE
