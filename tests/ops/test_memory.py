"""The extra memory of scoring stays under 256 MiB, whatever the prompt; measured by the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from vllm.score.engine.layout import RowLayout
from vllm.score.engine.statistics import STATISTICS
from vllm.score.ops.head import head_product
from vllm.score.ops.score_rows import score_chunks

rows, vocab, top = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
statistics = STATISTICS if top == 0 else ()
layout = RowLayout(0 if top < 0 else 1, statistics, top)
weight = torch.randn(vocab, 16, dtype=torch.bfloat16)
hidden = torch.randn(rows, 16, dtype=torch.bfloat16)
index, targets = torch.arange(rows), torch.zeros(rows, 1, dtype=torch.int64)
head = lambda h: head_product(h, weight, None)

def run(count):
    for chunk in score_chunks(head, hidden, index[:count], targets[:count], layout, vocab):
        assert torch.isfinite(chunk).all()
        del chunk

run(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
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
    assert int(done.stdout) < 256 << 10, "kibibytes"
