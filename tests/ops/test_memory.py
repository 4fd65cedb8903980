"""The extra memory of scoring stays under 128 MiB, whatever the prompt; measured by the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
import torch
from vllm.score.ops.statistics import RowLayout
from vllm.score.engine.request import ScoreSpec
from vllm.score.engine.worker import RequestScores, ScheduledRows, score_step

rows, vocab, top = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
layout = RowLayout(0 if top < 0 else 1, ("entropy", "rank") if top == 0 else (), top)
weight = torch.randn(vocab, 16, dtype=torch.bfloat16)
hidden = torch.randn(rows, 16, dtype=torch.bfloat16)

def run(count):
    scores = RequestScores(ScoreSpec(np.zeros((count, 1), np.int32), 0, layout, vocab))
    step = ScheduledRows("a", scores, 0, count, 0)
    done = score_step([step], hidden, lambda h: h @ weight.T)["a"]
    assert all(torch.isfinite(row).all() for row in done)
    return done

run(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    - (result.nbytes >> 10 if top < 0 else 0))
"""


@pytest.mark.parametrize(("rows", "vocab", "top"), [(400, 262_144, 0), (400, 262_144, -1)])
def test_extra_memory_is_bounded(rows, vocab, top):
    assert rows * vocab * 4 > 300 << 20, "one float32 copy must be larger than the bound"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(rows), str(vocab), str(top)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 128 << 10, "kibibytes"
