"""On a GPU, with either model runner: asynchronous scheduling, CUDA graphs, bfloat16.

pytest -m cuda                                # the V2 runner, vLLM's default there
VLLM_USE_V2_MODEL_RUNNER=0 pytest -m cuda     # the V1 runner
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts, token_logprobs
from vllm.score import score

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# Float32 attention runs in TF32 on a GPU (stock vLLM's too), so Hugging Face is met to 1e-2 and
# stock vLLM on the same engine much closer.
REFERENCE_TOLERANCE, STOCK_TOLERANCE = 3e-2, 2e-4
CACHE = {"kv_cache_memory_bytes": 1 << 30}
LENGTHS = [1, 2, 17, 255, 256, 257, 600, 1500]


V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"


@pytest.mark.parametrize("eager", [True, False])
def test_float32_scores_equal_hugging_face(eager, engine, reference):
    from vllm import SamplingParams

    llm = engine("llama", enforce_eager=eager, **CACHE)
    assert llm.llm_engine.vllm_config.use_v2_model_runner == V2
    prompts = random_prompts(LENGTHS, llm.llm_engine.model_config.get_vocab_size(), seed=0)
    scores = score(llm, prompts, use_tqdm=False)
    stock = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    for p, s, o in zip(prompts, scores, stock, strict=True):
        want = token_logprobs(reference("llama", p), p)
        np.testing.assert_allclose(s.logprobs, want, atol=REFERENCE_TOLERANCE)
        theirs = [o.prompt_logprobs[i][p[i]].logprob for i in range(1, len(p))]
        np.testing.assert_allclose(s.logprobs, theirs, atol=STOCK_TOLERANCE)


def test_asynchronous_scheduling_beside_generations(engine, reference):
    from vllm import SamplingParams

    llm = engine("llama", enforce_eager=True, async_scheduling=True, max_num_seqs=16, **CACHE)
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    prompts = random_prompts([30, 400, 5, 260, 90, 12, 700, 1000], 1000, seed=1)
    scoring = SamplingParams(score_mode=True, prompt_logprobs=0)
    generating = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    params = [scoring if i % 2 else generating for i in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)):
        if i % 2:
            want = token_logprobs(reference("llama", p), p)
            np.testing.assert_allclose(o.scores.logprobs, want, atol=REFERENCE_TOLERANCE)
        else:
            assert len(o.outputs[0].token_ids) == 20


def test_bfloat16_with_statistics_and_the_whole_vocabulary(engine, reference):
    llm = engine("llama", {"dtype": "bfloat16"}, dtype="bfloat16", enforce_eager=False, **CACHE)
    prompts = random_prompts([300, 900], llm.llm_engine.model_config.get_vocab_size(), seed=2)
    scores = score(llm, prompts, statistics=["entropy", "rank"], use_tqdm=False)
    full = score(llm, prompts, full_vocabulary=True, use_tqdm=False)
    for p, s, f in zip(prompts, scores, full, strict=True):
        rows = reference("llama", p, dtype="bfloat16")
        want = token_logprobs(rows, p)
        # bfloat16 keeps 8 bits: logits of some tens are off by a tenth.
        assert np.abs(s.logprobs - want).mean() < 0.1
        assert np.abs(s.statistics["entropy"] + (np.exp(rows) * rows).sum(-1)[:-1]).mean() < 0.1
        own = f.logprobs[np.arange(len(p) - 1), p[1:]]
        np.testing.assert_allclose(own, s.logprobs, atol=0.15)
        np.testing.assert_allclose(np.exp(f.logprobs).sum(-1), 1.0, atol=1e-4)


def test_candidates_top_and_chunks(engine, reference):
    llm = engine("llama", enforce_eager=True, max_num_batched_tokens=256, **CACHE)
    (prompt,) = random_prompts([1200], llm.llm_engine.model_config.get_vocab_size(), seed=3)
    rows = reference("llama", prompt)
    candidates = [[5, 6, 7], [8, 9, 10]]
    names = ["entropy", "rank", "argmax", "margin", "collision_probability", "logit_variance"]
    request = {"prompt_token_ids": prompt, "target_token_ids": candidates}
    (got,) = score(llm, [request], statistics=names, use_tqdm=False)
    (whole,) = score(llm, [prompt], statistics=names, top=3, use_tqdm=False)
    for i, ids in enumerate(candidates):
        np.testing.assert_allclose(got.logprobs[i], rows[-3 + i][ids], atol=REFERENCE_TOLERANCE)
    np.testing.assert_allclose(
        whole.logprobs, token_logprobs(rows, prompt), atol=REFERENCE_TOLERANCE
    )
    entropy = -(np.exp(rows) * rows).sum(-1)[:-1]
    np.testing.assert_allclose(whole.statistics["entropy"], entropy, atol=REFERENCE_TOLERANCE)
    assert (whole.statistics["argmax"] == whole.top_token_ids[:, 0]).all()
    assert (whole.statistics["argmax"] == rows.argmax(-1)[:-1]).mean() > 0.98


def test_aborted_requests_leave_their_neighbours_alone(engine, reference):
    from vllm import SamplingParams

    llm = engine("llama", enforce_eager=True, max_num_batched_tokens=256, **CACHE)
    prompts = random_prompts([900, 800, 700], 1000, seed=4)
    params = SamplingParams(score_mode=True, prompt_logprobs=0)
    ids = [
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": p}, params)
        for i, p in enumerate(prompts)
    ]
    llm.llm_engine.step()
    llm.llm_engine.abort_request([ids[0]], internal=True)
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs |= {o.request_id: o for o in llm.llm_engine.step() if o.finished}
    for i in (1, 2):
        want = token_logprobs(reference("llama", prompts[i]), prompts[i])
        np.testing.assert_allclose(outputs[str(i)].scores.logprobs, want, atol=REFERENCE_TOLERANCE)


@pytest.mark.parametrize("eager", [True, False])
def test_shared_contexts_are_computed_once(eager, engine, reference):
    """Groups that arrive in one call, larger than a step, with the scheduler running ahead."""
    from vllm import SamplingParams

    llm = engine("llama", enforce_eager=eager, **CACHE)
    contexts = random_prompts([333, 600, 1000], 1000, seed=5)
    tails = random_prompts([3, 1, 40, 7], 1000, seed=6)
    requests = [{"prompt_token_ids": c + t, "target_token_ids": t} for t in tails for c in contexts]
    llm.reset_prefix_cache()
    on = llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    off = score(llm, requests, skip_prefix_cache=True, use_tqdm=False)
    block = llm.llm_engine.vllm_config.cache_config.block_size
    for i, (o, without, r) in enumerate(zip(on, off, requests, strict=True)):
        ids, m = r["prompt_token_ids"], len(r["target_token_ids"])
        assert o.num_cached_tokens == (0 if i < 3 else (len(ids) - m - 1) // block * block)
        np.testing.assert_allclose(o.scores.logprobs, without.logprobs, atol=STOCK_TOLERANCE)
        want = token_logprobs(reference("llama", ids), ids)[-m:]
        np.testing.assert_allclose(o.scores.logprobs, want, atol=REFERENCE_TOLERANCE)


@pytest.mark.parametrize("where", ["layer", "head input", "head output", "logits processor"])
def test_hooks_in_the_worker_count(where, engine, model_dir):
    """Each adds a vector, as the same hook on Hugging Face's model in float64 does."""
    from transformers import AutoModelForCausalLM

    from tests.sequence import interventions

    llm = engine("llama", enforce_eager=True, **CACHE)
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"), dtype=torch.float64).eval()
    on_hidden = where in ("layer", "head input")
    size = model.config.hidden_size if on_hidden else model.config.vocab_size
    vector = 2 * torch.randn(size, generator=torch.Generator().manual_seed(3))
    if where == "layer":
        ours = interventions.steer_layer
        model.model.layers[0].register_forward_hook(lambda m, args, output: output + vector)
    elif where == "head input":
        ours = interventions.steer_head
        model.lm_head.register_forward_pre_hook(lambda m, args: (args[0] + vector,))
    else:
        ours = interventions.bias_head if where == "head output" else interventions.bias_logits
        model.lm_head.register_forward_hook(lambda m, args, output: output + vector)
    (p,) = random_prompts([300], model.config.vocab_size, seed=7)
    request = [{"prompt_token_ids": p, "target_token_ids": p[-20:]}]
    (before,) = score(llm, request, use_tqdm=False)
    llm.collective_rpc(ours, args=(vector.tolist(),))
    try:
        (found,) = score(llm, request, use_tqdm=False)
    finally:
        llm.collective_rpc(interventions.remove_hooks)
    with torch.no_grad():
        rows = model(torch.tensor([p])).logits[0].log_softmax(-1).numpy()
    np.testing.assert_allclose(
        found.logprobs, token_logprobs(rows, p)[-20:], atol=REFERENCE_TOLERANCE
    )
    assert np.abs(found.logprobs - before.logprobs).max() > 0.3


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
@pytest.mark.parametrize("eager", [True, False])
def test_scores_beside_drafts(eager, method, engine, model_dir, reference, tmp_path_factory):
    from tests.support.drafters import make_drafter
    from vllm import SamplingParams

    # The model drafts for itself, or a random head drafts what is turned down.
    drafter = model_dir("llama")
    if method == "eagle":
        drafter = make_drafter(tmp_path_factory.mktemp(method) / method, method, 128, 1024)
    llm = engine(
        "llama",
        enforce_eager=eager,
        max_num_batched_tokens=256,
        speculative_config={
            "method": method,
            "model": str(drafter),
            "num_speculative_tokens": 3,
        },
        **CACHE,
    )
    # The last one has one row left behind the cache, which vLLM pads beside drafts.
    prompts = random_prompts([30, 400, 5, 260, 90, 66], 1024, seed=8)
    scoring = SamplingParams(score_mode=True, prompt_logprobs=0)
    generating = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    params = [scoring if i % 2 else generating for i in range(len(prompts))]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    last = {"prompt_token_ids": prompts[5], "target_token_ids": prompts[5][-1:]}
    for i, p in enumerate(prompts[::2]):
        llm.llm_engine.add_request(f"text-{i}", {"prompt_token_ids": p}, generating)
    again, steps = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        if steps in (3, 4, 5):
            one = SamplingParams(score_mode=True)
            llm.llm_engine.add_request(f"one-{steps}", last, one)
        steps += 1
        again |= {o.request_id: o for o in llm.llm_engine.step() if o.finished}
    for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)):
        if i % 2:
            want = token_logprobs(reference("llama", p), p)
            np.testing.assert_allclose(o.scores.logprobs, want, atol=REFERENCE_TOLERANCE)
        else:
            assert len(o.outputs[0].token_ids) == 40
    want = token_logprobs(reference("llama", prompts[5]), prompts[5])[-1:]
    for name in ("one-3", "one-4", "one-5"):
        found = again[name].scores.logprobs
        np.testing.assert_allclose(found, want, atol=REFERENCE_TOLERANCE)


def test_offloaded_prefixes_end_before_the_first_scored_row(engine, reference):
    from vllm import SamplingParams

    llm = engine(
        "llama",
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "SimpleCPUOffloadConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28},
        },
        **CACHE,
    )
    (context,) = random_prompts([600], 1024, seed=9)
    tails = random_prompts([3, 1, 40], 1024, seed=10)
    requests = [{"prompt_token_ids": context + t, "target_token_ids": t} for t in tails]
    requests += [{"prompt_token_ids": context, "target_token_ids": context[-n:]} for n in (5, 599)]
    first = llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    llm.reset_prefix_cache()  # what is found from now on is the connector's
    second = llm.generate(requests, SamplingParams(score_mode=True), use_tqdm=False)
    for outputs in (first, second):
        for r, o in zip(requests, outputs, strict=True):
            ids, m = r["prompt_token_ids"], len(r["target_token_ids"])
            assert (o.num_cached_tokens or 0) <= len(ids) - m - 1
            want = token_logprobs(reference("llama", ids), ids)[-m:]
            np.testing.assert_allclose(o.scores.logprobs, want, atol=REFERENCE_TOLERANCE)
    assert any(o.num_cached_tokens for o in second)
