"""Engines that speculate score as others do; nothing is drafted for score requests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts, token_logprobs
from tests.support.drafters import HEADS, make_drafter, make_mtp_model
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
BLOCK, LIMIT = 32, 512
VOCAB = 1024
METHODS = ("draft_model", "eagle", "eagle3", "medusa", "mtp")


@pytest.fixture(scope="session")
def speculating(engine, model_dir, reference, tmp_path_factory):
    """`speculating(method)`: an engine, and the float64 reference for its model."""
    root, started = tmp_path_factory.mktemp("drafters"), {}
    options = {"block_size": BLOCK, "max_model_len": LIMIT, "max_num_seqs": 16}

    def start(method):
        if method in started:
            return started[method]
        if method == "mtp":
            from transformers import AutoModelForCausalLM

            from vllm import LLM

            folder = make_mtp_model(root / method)
            hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
            llm = LLM(
                str(folder),
                dtype="float32",
                enforce_eager=True,
                kv_cache_memory_bytes=64 << 20,
                distributed_executor_backend="uni",
                max_num_batched_tokens=256,
                speculative_config={"method": "mtp", "num_speculative_tokens": 1},
                **options,
            )

            def want(ids):
                with torch.no_grad():
                    rows = hf(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
                return token_logprobs(rows, ids)

        else:
            # The model itself as its drafter: the target takes every draft.
            target = model_dir("llama")
            own = method == "draft_model"
            drafter = target if own else make_drafter(root / method, method, 128, VOCAB)
            llm = engine(
                "llama",
                speculative_config={
                    "method": method,
                    "model": str(drafter),
                    "num_speculative_tokens": HEADS,
                },
                **options,
            )

            def want(ids):
                return token_logprobs(reference("llama", ids), ids)

        started[method] = llm, want
        return started[method]

    return start


def generating(tokens):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def scoring():
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, prompt_logprobs=0)


def drafts(llm, monkeypatch):
    """Draft tokens by request that are scheduled from now on."""
    scheduler, found = llm.llm_engine.engine_core.engine_core.scheduler, {}
    schedule = scheduler.schedule

    def watching(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for name, ids in output.scheduled_spec_decode_tokens.items():
            found.setdefault(name, []).extend(ids)
        return output

    monkeypatch.setattr(scheduler, "schedule", watching)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_scores_alone_and_beside_drafts(method, speculating, monkeypatch):
    llm, want = speculating(method)
    alone = random_prompts([2, 3, BLOCK + 1, 257, LIMIT], VOCAB, seed=1)
    for p, s in zip(alone, score(llm, alone, use_tqdm=False), strict=True):
        np.testing.assert_allclose(s.logprobs, want(p), atol=TOLERANCE)

    texts = random_prompts([10, 40, 90], VOCAB, seed=2)
    generate = [{"prompt_token_ids": p} for p in texts]
    before = llm.generate(generate, generating(24), use_tqdm=False)
    llm.reset_prefix_cache()
    drafted = drafts(llm, monkeypatch)
    prompts = random_prompts([300, 65, LIMIT], VOCAB, seed=3)
    pairs = zip(prompts, generate, strict=True)
    mixed = [r for p, g in pairs for r in ({"prompt_token_ids": p}, g)]
    outputs = llm.generate(mixed, [scoring(), generating(24)] * 3, use_tqdm=False)
    with_drafts = {name.rpartition("-")[0] for name in drafted}
    for p, scored in zip(prompts, outputs[::2], strict=True):
        np.testing.assert_allclose(scored.scores.logprobs, want(p), atol=TOLERANCE)
        assert scored.request_id not in with_drafts
    for old, new in zip(before, outputs[1::2], strict=True):
        assert old.outputs[0].token_ids == new.outputs[0].token_ids
        assert new.request_id in with_drafts


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_one_row_left_beside_drafts(method, speculating, monkeypatch):
    """vLLM pads a request with one token left to as many rows as those with drafts have."""
    from vllm import SamplingParams

    llm, want = speculating(method)
    engine, outputs = llm.llm_engine, {}
    (prompt,) = random_prompts([2 * BLOCK + 2], VOCAB, seed=4)
    score(llm, [prompt], use_tqdm=False)
    for i, p in enumerate(random_prompts([10, 40, 90], VOCAB, seed=5)):
        engine.add_request(f"text-{i}", {"type": "token", "prompt_token_ids": p}, generating(40))
    drafted, steps = drafts(llm, monkeypatch), 0
    while engine.has_unfinished_requests():
        if steps in (2, 3, 5):
            request = {"type": "token", "prompt_token_ids": prompt}
            request["target_token_ids"] = prompt[-1:]
            engine.add_request(f"one-{steps}", request, SamplingParams(score_mode=True))
        steps += 1
        outputs |= {o.request_id: o for o in engine.step() if o.finished}
    ones = [o for name, o in outputs.items() if name.startswith("one-")]
    assert len(ones) == 3
    # EAGLE has the last block of a hit computed again.
    cached = 2 * BLOCK if method == "draft_model" else BLOCK
    for o in ones:
        assert o.num_cached_tokens == cached
        assert o.outputs[0].token_ids == []
        np.testing.assert_allclose(o.scores.logprobs, want(prompt)[-1:], atol=TOLERANCE)
    padding = [ids for name, ids in drafted.items() if name.startswith("one-")]
    assert all(token == -1 for ids in padding for token in ids)
    if method == "draft_model":
        assert padding, "no request was padded"
        assert steps < 40, "no draft was taken"


def test_drafts_that_only_the_gpu_counts_are_refused(speculating, monkeypatch):
    llm, _ = speculating("draft_model")
    config = llm.llm_engine.vllm_config.speculative_config
    monkeypatch.setattr(config, "enable_adaptive_verification", True)
    monkeypatch.setattr(llm.llm_engine, "score_mode_checked", False, raising=False)
    with pytest.raises(ScoreModeError, match="enable_adaptive_verification"):
        score(llm, [[5, 6, 7]], use_tqdm=False)
