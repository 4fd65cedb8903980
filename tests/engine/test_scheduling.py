"""Scores do not depend on how the engine schedules: chunks, preemption, caching, neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import random_prompts, token_logprobs
from vllm.score import score

pytestmark = pytest.mark.engine

TOLERANCE = 2e-5
# Rows of one product are added up in another order when the batch has another size.
BATCH_TOLERANCE = 1e-5


def vocab_of(llm):
    return llm.llm_engine.model_config.get_vocab_size()


def generate_params(max_tokens):
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1)


def score_params(**options):
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, prompt_logprobs=0, **options)


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**20))
def test_random_mixes_of_200_equal_one_by_one(llm, seed):
    rng = np.random.default_rng(seed)
    vocab, requests = vocab_of(llm), []
    for n in rng.integers(1, 90, 200).tolist():
        ids = rng.integers(2, vocab, n).tolist()
        request = {"prompt_token_ids": ids}
        kind = rng.integers(3)
        if n > 1 and kind:
            m, k = int(rng.integers(1, n)), int(rng.integers(1, 4))
            targets = rng.integers(0, vocab, (m, k))
            request["target_token_ids"] = (targets if kind == 1 else targets[:, 0]).tolist()
        requests.append(request)
    together = score(llm, requests, use_tqdm=False)
    for i in rng.choice(200, 25, replace=False).tolist():
        (alone,) = score(llm, [requests[i]], use_tqdm=False)
        assert alone.logprobs.shape == together[i].logprobs.shape
        np.testing.assert_allclose(together[i].logprobs, alone.logprobs, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize("budget", [16, 33, 128])
def test_every_split_of_the_prefill(budget, engine, reference):
    llm = engine("llama", max_num_batched_tokens=budget, max_num_seqs=8, max_model_len=512)
    prompts = random_prompts(
        [1, 2, budget, budget + 1, budget + 2, 2 * budget + 1], vocab_of(llm), budget
    )
    prompts = [p[:512] for p in prompts]
    for p, s in zip(prompts, score(llm, prompts, use_tqdm=False), strict=True):
        want = token_logprobs(reference("llama", p), p)
        np.testing.assert_allclose(s.logprobs, want, atol=TOLERANCE)


def test_repeated_prompts_read_the_prefix_cache_before_the_first_scored_row(llm, reference):
    from vllm import SamplingParams

    (shared,) = random_prompts([700], vocab_of(llm), seed=11)
    tails = random_prompts([3, 5, 9, 60], vocab_of(llm), seed=12)
    score(llm, [shared], use_tqdm=False)
    prompts = [shared + t for t in tails]
    requests = [
        {"prompt_token_ids": p, "target_token_ids": t} for p, t in zip(prompts, tails, strict=True)
    ]
    outputs = llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    for p, t, o in zip(prompts, tails, outputs, strict=True):
        assert 0 < o.num_cached_tokens <= len(p) - len(t) - 1
        want = token_logprobs(reference("llama", p), p)[-len(t) :]
        np.testing.assert_allclose(o.scores.logprobs, want, atol=TOLERANCE)
    (again,) = llm.generate(
        [requests[-1]],
        SamplingParams(score_mode=True, skip_reading_prefix_cache=True),
        use_tqdm=False,
    )
    assert not again.num_cached_tokens
    np.testing.assert_allclose(
        again.scores.logprobs, outputs[-1].scores.logprobs, atol=BATCH_TOLERANCE
    )
    # All rows are wanted: nothing may come from the cache.
    for _ in range(2):
        (whole,) = llm.generate([{"prompt_token_ids": shared}], score_params(), use_tqdm=False)
        assert not whole.num_cached_tokens
        want = token_logprobs(reference("llama", shared), shared)
        np.testing.assert_allclose(whole.scores.logprobs, want, atol=TOLERANCE)


def count_preemptions(llm, monkeypatch):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, original = [], type(scheduler)._preempt_request

    def counting(self, request, *args, **kwargs):
        preempted.append(request)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(type(scheduler), "_preempt_request", counting)
    return preempted


@pytest.mark.parametrize("scheduler", [None, "vllm.v1.core.sched.async_scheduler.AsyncScheduler"])
def test_a_cache_too_small_for_the_batch(scheduler, engine, reference, monkeypatch):
    """Growing generations push score requests out in the middle of their prefill."""
    options = {"scheduler_cls": scheduler} if scheduler else {}
    llm = engine(
        "llama",
        max_num_batched_tokens=128,
        max_num_seqs=8,
        max_model_len=1024,
        num_gpu_blocks_override=10,
        **options,
    )
    preempted = count_preemptions(llm, monkeypatch)
    vocab = vocab_of(llm)
    short = random_prompts([100, 110, 120], vocab, seed=21)
    long = random_prompts([500, 600, 400, 700], vocab, seed=22)
    prompts = [
        {"prompt_token_ids": p} for p in [short[0], long[0], short[1], long[1], short[2], *long[2:]]
    ]
    params = [
        score_params() if len(p["prompt_token_ids"]) > 200 else generate_params(150)
        for p in prompts
    ]
    priorities = [0 if len(p["prompt_token_ids"]) <= 200 else 1 for p in prompts]
    del priorities  # first come, first served: the youngest is preempted
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert preempted, "this test needs preemptions to mean anything"
    for p, q, o in zip(prompts, params, outputs, strict=True):
        ids = p["prompt_token_ids"]
        if q.score_mode:
            want = token_logprobs(reference("llama", ids), ids)
            np.testing.assert_allclose(o.scores.logprobs, want, atol=TOLERANCE)
        else:
            assert len(o.outputs[0].token_ids) == 150


def test_scores_beside_generations(llm, reference):
    prompts = random_prompts([30, 400, 5, 260, 90, 12], vocab_of(llm), seed=31)
    params = [score_params() if i % 2 else generate_params(20) for i in range(6)]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)):
        if i % 2:
            assert o.outputs[0].token_ids == []
            want = token_logprobs(reference("llama", p), p)
            np.testing.assert_allclose(o.scores.logprobs, want, atol=TOLERANCE)
        else:
            assert o.scores is None
            assert o.prompt_logprobs is None
            text = p + list(o.outputs[0].token_ids)
            own = token_logprobs(reference("llama", text), text)[len(p) - 1 :]
            got = [
                step[t].logprob
                for step, t in zip(o.outputs[0].logprobs, text[len(p) :], strict=True)
            ]
            np.testing.assert_allclose(got, own, atol=TOLERANCE)


def test_requests_that_arrive_while_others_run(llm, reference):
    engine, arrivals = (
        llm.llm_engine,
        random_prompts([300, 500, 20, 1, 700, 260], vocab_of(llm), 41),
    )
    outputs, added = {}, 0
    while added < len(arrivals) or engine.has_unfinished_requests():
        if added < len(arrivals):
            engine.add_request(
                f"late-{added}",
                {"type": "token", "prompt_token_ids": arrivals[added]},
                score_params(),
            )
            added += 1
        for o in engine.step():
            outputs[o.request_id] = o
    for i, p in enumerate(arrivals):
        want = token_logprobs(reference("llama", p), p)
        np.testing.assert_allclose(outputs[f"late-{i}"].scores.logprobs, want, atol=TOLERANCE)


def test_ngram_speculation_beside_scores(engine, reference):
    llm = engine(
        "llama",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        max_model_len=1024,
    )
    loop = random_prompts([8], vocab_of(llm), seed=51)[0] * 20
    (text,) = random_prompts([300], vocab_of(llm), seed=52)
    drafted, scored = llm.generate(
        [{"prompt_token_ids": loop}, {"prompt_token_ids": text}],
        [generate_params(30), score_params()],
        use_tqdm=False,
    )
    assert len(drafted.outputs[0].token_ids) == 30
    np.testing.assert_allclose(
        scored.scores.logprobs, token_logprobs(reference("llama", text), text), atol=TOLERANCE
    )
