"""NaN that a request leaves in the KV cache spoils no score for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers import random_prompts
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine


@pytest.fixture
def nan_engine(engine: Any) -> Any:
    return engine("llama", {"seed": 7}, max_model_len=512)


def runner(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def poison_blocks(llm: Any, prompt: list[int]) -> None:
    """What lies in blocks that nobody has written yet is anything."""
    for cache in runner(llm).kv_caches:
        cache.fill_(float("nan"))


def poison_prefix(llm: Any, prompt: list[int]) -> None:
    """A generation whose keys and values overflow; the weights are right again after it."""
    from vllm import SamplingParams

    norm = runner(llm).model.model.layers[0].input_layernorm.weight
    saved = norm.data.clone()
    norm.data[3] = float("nan")
    try:
        params = SamplingParams(max_tokens=1)
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    finally:
        norm.data.copy_(saved)


@pytest.mark.parametrize("poison", [poison_blocks, poison_prefix])
def test_nan_in_the_cache(nan_engine: Any, poison: Any) -> None:
    from vllm import SamplingParams

    llm = nan_engine
    prompt, other = random_prompts([300, 40], 1024, seed=30)
    given = {"prompt_token_ids": prompt, "target_token_ids": prompt[-3:]}
    llm.reset_prefix_cache()
    want = [s.logprobs for s in score(llm, [given, other], use_tqdm=False)]

    def generate() -> Any:
        params = SamplingParams(score_mode=True)
        return llm.generate([given], params, use_tqdm=False)[0].scores

    llm.reset_prefix_cache()
    poison(llm, prompt)
    failed = generate()
    for message in ("prompt position 297 is NaN", "KV cache .score it again", "dtype="):
        with pytest.raises(ScoreModeError, match=message):
            len(failed)
    np.testing.assert_allclose(generate().logprobs, want[0], atol=1e-6)
    assert not any(cache.isnan().any() for cache in runner(llm).kv_caches)
    # score() does it again by itself.
    llm.reset_prefix_cache()
    poison(llm, prompt)
    found = score(llm, [given, other], use_tqdm=False)
    for scores, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-6)


def test_a_cache_in_use_is_not_emptied(nan_engine: Any) -> None:
    """A score request beside a generation reads no cached prefix, and spoils no generation."""
    from vllm import SamplingParams

    llm = nan_engine
    engine = llm.llm_engine
    (prompt,) = random_prompts([300], 1024, seed=31)
    given = {"prompt_token_ids": prompt, "target_token_ids": prompt[-3:]}
    (clean,) = score(llm, [given], use_tqdm=False)
    tokens = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    text = {"prompt_token_ids": prompt[:20]}
    alone = llm.generate([text], tokens, use_tqdm=False)[0].outputs[0].token_ids
    llm.reset_prefix_cache()
    poison_prefix(llm, prompt)
    params = SamplingParams(score_mode=True)
    assert llm.generate([given], params, use_tqdm=False)[0].outputs[0].finish_reason == "error"
    for cache in runner(llm).kv_caches:  # what a score would read, but for the prefix
        cache.nan_to_num_(0.0)
    engine.add_request("tokens", text, tokens)
    engine.step()
    engine.add_request("scores", given, params)
    finished = {}
    while engine.has_unfinished_requests():
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    np.testing.assert_allclose(finished["scores"].scores.logprobs, clean.logprobs, atol=1e-6)
    assert finished["tokens"].outputs[0].token_ids == alone
