"""Two workers, each with half of the vocabulary: the same scores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import random_prompts, token_logprobs

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot hold two workers"),
]


def test_two_workers_score_as_one(model_dir, reference, tmp_path):
    model = model_dir("llama")
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    prompts = random_prompts([2, 100, 300, 700], vocab, seed=0)
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    cores = sorted(os.sched_getaffinity(0))[:2]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    program = Path(__file__).with_name("score_tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, program, str(model), tmp_path / "prompts.json", tmp_path / "out.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads((tmp_path / "out.json").read_text())
    assert got["roles"] == ["engine core", "worker", "worker"]
    for i, p in enumerate(prompts):
        rows = reference("llama", p)
        np.testing.assert_allclose(got["logprobs"][i], token_logprobs(rows, p), atol=2e-5)
        np.testing.assert_allclose(
            got["entropy"][i], -(np.exp(rows) * rows).sum(-1)[:-1], atol=3e-5
        )
        assert got["argmax"][i] == rows.argmax(-1)[:-1].tolist()
        own = token_logprobs(rows, p)[:, None]
        rank = 1 + (rows[:-1] > own).sum(-1)
        # Neighbours in rank may be closer than float32 tells apart.
        assert (got["rank"][i] == rank).mean() > 0.99
    rows = reference("llama", prompts[1])[:-1]
    assert (np.array(got["top"]) == np.argsort(-rows, axis=-1)[:, :5]).mean() > 0.99
    np.testing.assert_allclose(got["full"], rows, atol=2e-5)
