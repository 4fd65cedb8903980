"""Requests with a common context: it is computed once, and no score changes or is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import random_prompts, token_logprobs
from vllm.score import score

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
# Blocks of the cache, and steps that end in the middle of one.
BLOCK, BUDGET = 32, 80
SLIDING = {"config_overrides": {"sliding_window": 48}}


@pytest.fixture(scope="module")
def small_blocks(engine):
    return engine(
        "llama", block_size=BLOCK, max_num_batched_tokens=BUDGET, max_num_seqs=16, max_model_len=512
    )


@pytest.fixture(scope="module")
def tiny_cache(engine):
    """23 blocks, 736 tokens."""
    return engine(
        "llama",
        block_size=BLOCK,
        max_num_batched_tokens=256,
        max_num_seqs=64,
        max_model_len=512,
        num_gpu_blocks_override=24,
    )


def vocab_of(llm):
    return llm.llm_engine.model_config.get_vocab_size()


def run(llm, requests, **options):
    """Outputs of score requests, in the order given."""
    from vllm import SamplingParams

    return llm.generate(requests, SamplingParams(score_mode=True, **options), use_tqdm=False)


def continuations(context, tails):
    return [{"prompt_token_ids": context + t, "target_token_ids": t} for t in tails]


def cached(outputs):
    return [o.num_cached_tokens for o in outputs]


def full_blocks(request, block=BLOCK):
    """Cached tokens that keep every score: whole blocks before the first scored row."""
    first_row = len(request["prompt_token_ids"]) - len(request["target_token_ids"]) - 1
    return first_row // block * block


def check(outputs, requests, reference, **model):
    for o, r in zip(outputs, requests, strict=True):
        ids, m = r["prompt_token_ids"], len(r["target_token_ids"])
        want = token_logprobs(reference("llama", ids, **model), ids)[-m:]
        np.testing.assert_allclose(o.scores.logprobs, want, atol=TOLERANCE)


def test_contexts_that_arrive_together_are_computed_once(small_blocks, reference):
    """Three contexts longer than a step, their 18 continuations interleaved in one call."""
    llm = small_blocks
    contexts = random_prompts([100, 230, 333], vocab_of(llm), seed=1)
    tails = random_prompts([3, 1, 7, 40, 2, 5], vocab_of(llm), seed=2)
    groups = [continuations(c, tails) for c in contexts]
    requests = [r for row in zip(*groups, strict=True) for r in row]
    llm.reset_prefix_cache()
    outputs = run(llm, requests)
    check(outputs, requests, reference)
    # Each context's first request computes everything, the others what follows its blocks.
    assert cached(outputs) == [0, 0, 0] + [full_blocks(r) for r in requests[3:]]


def hits(llm, monkeypatch):
    """Cached tokens of whatever finishes from now on."""
    engine, found = llm.llm_engine, []
    step = engine.step

    def watching():
        outputs = step()
        found.extend(cached(o for o in outputs if o.finished))
        return outputs

    monkeypatch.setattr(engine, "step", watching)
    return found


def test_score_sends_a_group_together_and_answers_in_order(tiny_cache, reference, monkeypatch):
    """In a cache that holds one context at a time, the order decides whether it is found."""
    llm = tiny_cache
    contexts = random_prompts([420] * 4, vocab_of(llm), seed=3)
    tails = random_prompts([2] * 5, vocab_of(llm), seed=4)
    groups = [continuations(c, tails) for c in contexts]
    requests = [r for row in zip(*groups, strict=True) for r in row]
    llm.reset_prefix_cache()
    found = hits(llm, monkeypatch)
    scored = score(llm, requests, use_tqdm=False)
    assert sum(found) == 4 * 4 * full_blocks(requests[0])
    for s, r in zip(scored, requests, strict=True):
        ids = r["prompt_token_ids"]
        assert s.token_ids.tolist() == r["target_token_ids"]
        want = token_logprobs(reference("llama", ids), ids)[-2:]
        np.testing.assert_allclose(s.logprobs, want, atol=TOLERANCE)
    found.clear()
    run(llm, requests)  # in the order given, each evicts the next one's context
    assert sum(found) < 4 * full_blocks(requests[0])


def test_64_continuations_in_a_cache_that_is_too_small_for_them(tiny_cache, reference):
    llm = tiny_cache
    llm.reset_prefix_cache()
    (context,) = random_prompts([400], vocab_of(llm), seed=5)
    requests = continuations(context, random_prompts([5] * 64, vocab_of(llm), seed=6))
    outputs = run(llm, requests)
    check(outputs[::9], requests[::9], reference)
    assert cached(outputs) == [0] + [full_blocks(requests[0])] * 63


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_overlap_of_what_is_cached_and_what_is_scored(small_blocks, reference, data):
    """Repeats and prefixes of one text, scored from anywhere: what is cached often reaches past
    the first scored row.
    """
    llm = small_blocks
    (text,) = random_prompts([300], vocab_of(llm), seed=7)
    want = token_logprobs(reference("llama", text), text)
    requests = []
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(2, 300))
        m = data.draw(st.one_of(st.integers(1, n - 1), st.just(1), st.just(n - 1)))
        requests.append({"prompt_token_ids": text[:n], "target_token_ids": text[n - m : n]})
    if data.draw(st.booleans()):
        llm.reset_prefix_cache()
    for r, o in zip(requests, run(llm, requests), strict=True):
        n, m = len(r["prompt_token_ids"]), len(r["target_token_ids"])
        np.testing.assert_allclose(o.scores.logprobs, want[n - 1 - m : n - 1], atol=TOLERANCE)
        assert (o.num_cached_tokens or 0) <= full_blocks(r)


def test_float32_scores_are_the_same_with_and_without_the_cache(small_blocks):
    llm = small_blocks
    (context,) = random_prompts([290], vocab_of(llm), seed=8)
    for request in continuations(context, random_prompts([1, 4, 33], vocab_of(llm), seed=9)):
        run(llm, [request])
        (on,), (off,) = run(llm, [request]), run(llm, [request], skip_reading_prefix_cache=True)
        assert on.num_cached_tokens == full_blocks(request)
        assert not off.num_cached_tokens
        # One unit in the last place of a value near 8 is 9.5e-7.
        np.testing.assert_allclose(on.scores.logprobs, off.scores.logprobs, rtol=0, atol=2e-6)


def test_four_candidates_of_one_token_are_one_request(small_blocks, reference):
    llm = small_blocks
    (ids,) = random_prompts([200], vocab_of(llm), seed=10)
    candidates = [5, 17, 400, ids[-1]]
    (s,) = score(llm, [{"prompt_token_ids": ids, "target_token_ids": [candidates]}], use_tqdm=False)
    want = reference("llama", ids)[len(ids) - 2, candidates]
    np.testing.assert_allclose(s.logprobs, want[None], atol=TOLERANCE)


def test_sliding_windows_beside_full_attention(engine):
    """Gemma-2: every other layer sees 48 tokens, its blocks behind them are given back."""
    llm = engine(
        "gemma2", SLIDING, block_size=BLOCK, max_num_batched_tokens=BUDGET, max_model_len=512
    )
    (context,) = random_prompts([300], vocab_of(llm), seed=11)
    requests = continuations(context, random_prompts([3, 9, 60, 1], vocab_of(llm), seed=12))
    llm.reset_prefix_cache()
    with_cache = [run(llm, requests), run(llm, requests)]
    without = run(llm, requests, skip_reading_prefix_cache=True)
    assert all(cached(with_cache[1])), "this test needs hits to mean anything"
    for outputs in with_cache:
        for on, off, r in zip(outputs, without, requests, strict=True):
            assert on.num_cached_tokens <= full_blocks(r)
            np.testing.assert_allclose(on.scores.logprobs, off.scores.logprobs, atol=TOLERANCE)


def test_what_is_cached_is_forgotten_when_the_workers_are_called(small_blocks, reference):
    """A function run in the workers may have changed the model."""
    llm = small_blocks
    (context,) = random_prompts([150], vocab_of(llm), seed=13)
    requests = continuations(context, [[3, 4]])
    run(llm, requests)
    assert cached(run(llm, requests)) == [full_blocks(requests[0])]
    llm.collective_rpc("check_health")
    assert cached(run(llm, requests)) == [0]
    assert cached(run(llm, requests)) == [full_blocks(requests[0])]
