"""An engine whose process is killed, or ends at Ctrl-C: whoever waits for it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("killed", "EngineDeadError", "the engine's process was ended by signal 9; start it anew."),
        ("interrupted", "KeyboardInterrupt", ""),
    ],
)
def test_the_error_arrives_within_seconds_and_names_the_cause(how, error, said, model_dir):
    program = Path(__file__).with_name("score_dead_engine.py")
    done = subprocess.run(
        [sys.executable, program, model_dir("llama"), how],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["error"] == error and found["said"] == said
    assert found["seconds"] < 10
