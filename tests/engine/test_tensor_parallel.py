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
from tests.sequence import interventions
from vllm.score.sequence import SequenceProbVLLMHook

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot hold two workers"),
]


PROMPT_LENGTHS = [2, 100, 300, 700]
CONTEXTS = ["The header of a message is part of what is read first. " * 12, "in "]
TARGETS = [" the", "the", " The header is read.", "Paris", "漢字"]


@pytest.fixture(scope="module")
def inputs(model_dir):
    """What the program scores, and vectors for the interventions it makes."""
    config = json.loads((model_dir("llama") / "config.json").read_text())
    rng = np.random.default_rng(1)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    sizes = {"steer_layer": hidden, "steer_head": hidden, "bias_head": vocab, "bias_logits": vocab}
    return {
        "prompts": random_prompts(PROMPT_LENGTHS, vocab, seed=0),
        "contexts": CONTEXTS,
        "targets": TARGETS,
        "interventions": {
            name: rng.normal(scale=2, size=n).astype(np.float32).tolist()
            for name, n in sizes.items()
        },
    }


@pytest.fixture(scope="module")
def got(model_dir, inputs, tmp_path_factory):
    """What it found."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    (folder / "in.json").write_text(json.dumps(inputs))
    cores = sorted(os.sched_getaffinity(0))[:2]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # functions for the workers
        "PYTHONPATH": str(Path(__file__).parents[2]),  # where the workers find them
    }
    program = Path(__file__).with_name("score_tensor_parallel.py")
    done = subprocess.run(
        [sys.executable, program, model_dir("llama"), folder / "in.json", folder / "out.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def test_two_workers_score_as_one(got, inputs, reference):
    assert got["roles"] == ["engine core", "worker", "worker"]
    prompts = inputs["prompts"]
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


def test_sequences_have_the_same_probability_with_one_worker(got, llm):
    one = SequenceProbVLLMHook(llm).get_log_prob(CONTEXTS, TARGETS)
    for name in ("plain", "again"):
        assert len(got["sequences"][name]) == len(one) == len(CONTEXTS) * len(TARGETS)
        for two_workers, one_worker in zip(got["sequences"][name], one, strict=True):
            assert two_workers["token_ids"] == one_worker["token_ids"]
            assert two_workers["spans_boundary"] == one_worker["spans_boundary"]
            np.testing.assert_allclose(
                two_workers["token_log_probs"], one_worker["token_log_probs"], atol=2e-5
            )
            assert two_workers["log_prob"] == pytest.approx(one_worker["log_prob"], abs=1e-4)


@pytest.mark.parametrize("name", ["steer_layer", "steer_head", "bias_head", "bias_logits"])
def test_hooks_in_both_workers_change_the_scores_as_in_one(name, got, inputs, llm):
    hook = SequenceProbVLLMHook(llm)
    llm.collective_rpc(getattr(interventions, name), args=(inputs["interventions"][name],))
    try:
        one = hook.get_log_prob(CONTEXTS, TARGETS)
    finally:
        llm.collective_rpc(interventions.remove_hooks)
    for two_workers, one_worker, plain in zip(
        got["sequences"][name], one, got["sequences"]["plain"], strict=True
    ):
        np.testing.assert_allclose(
            two_workers["token_log_probs"], one_worker["token_log_probs"], atol=3e-5
        )
        assert abs(two_workers["log_prob"] - plain["log_prob"]) > 1e-3
