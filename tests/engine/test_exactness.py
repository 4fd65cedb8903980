"""Scores of the real engine against Hugging Face in float64, on five architectures."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers import random_prompts, token_logprobs
from vllm.score import score

pytestmark = pytest.mark.engine

# 20 prompts; with steps of 256 tokens most of them are split, some several times, and share
# steps with their neighbours.
LENGTHS = [1, 2, 3, 4, 7, 17, 31, 64, 100, 128, 129, 200, 255, 256, 257, 300, 513, 700, 1024, 1500]
TOLERANCE = 2e-5


def worst_difference(scores, prompts, log_softmax):
    return max(
        np.abs(s.logprobs - token_logprobs(log_softmax(p), p)).max(initial=0.0)
        for s, p in zip(scores, prompts, strict=True)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tied_and_untied_heads(architecture, tied, engine, reference):
    options = {"tie_word_embeddings": tied}
    llm = engine(architecture, options)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts([5, 300, 400], vocab, seed=1)
    scores = score(llm, prompts, use_tqdm=False)
    assert (
        worst_difference(scores, prompts, lambda p: reference(architecture, p, **options))
        <= TOLERANCE
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
def test_scores_equal_hugging_face(architecture, engine, reference):
    llm = engine(architecture)
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts(LENGTHS, vocab, seed=0)
    scores = score(llm, prompts, use_tqdm=False)
    assert [len(s) for s in scores] == [n - 1 for n in LENGTHS]
    assert all(s.logprobs.dtype == np.float32 for s in scores)
    assert worst_difference(scores, prompts, lambda p: reference(architecture, p)) <= TOLERANCE


def test_soft_capped_logits_are_stock_vllms(engine, reference):
    """Gemma-2's forward pass itself differs from Hugging Face's: no more than stock vLLM's does."""
    from vllm import SamplingParams

    llm = engine("gemma2")
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts(LENGTHS, vocab, seed=0)
    scores = score(llm, prompts, use_tqdm=False)
    stock = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    stocks = [
        np.array([o.prompt_logprobs[i][p[i]].logprob for i in range(1, len(p))])
        for o, p in zip(stock, prompts, strict=True)
    ]
    for s, values in zip(scores, stocks, strict=True):
        np.testing.assert_allclose(s.logprobs, values, atol=TOLERANCE)
    wants = [token_logprobs(reference("gemma2", p), p) for p in prompts]
    ours = max(np.abs(s.logprobs - w).max(initial=0) for s, w in zip(scores, wants, strict=True))
    theirs = max(np.abs(v - w).max(initial=0) for v, w in zip(stocks, wants, strict=True))
    assert ours <= max(TOLERANCE, theirs + TOLERANCE)


def test_targets_need_not_be_the_prompts_own(llm, reference):
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts([3, 40, 290], vocab, seed=2)
    targets = [random_prompts([m], vocab, seed=m)[0] for m in (1, 7, 289)]
    requests = [
        {"prompt_token_ids": p, "target_token_ids": t}
        for p, t in zip(prompts, targets, strict=True)
    ]
    for p, t, s in zip(prompts, targets, score(llm, requests, use_tqdm=False), strict=True):
        rows = reference("llama", p)[len(p) - 1 - len(t) : len(p) - 1]
        np.testing.assert_allclose(s.logprobs, rows[np.arange(len(t)), t], atol=TOLERANCE)
        assert s.start == len(p) - len(t)
        assert s.token_ids.tolist() == t


def test_several_candidates_a_position(llm, reference):
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompt = random_prompts([300], vocab, seed=3)[0]
    targets = np.random.default_rng(3).integers(0, vocab, (10, 4)).tolist()
    (s,) = score(llm, [{"prompt_token_ids": prompt, "target_token_ids": targets}], use_tqdm=False)
    rows = reference("llama", prompt)[len(prompt) - 11 : len(prompt) - 1]
    assert s.logprobs.shape == (10, 4)
    np.testing.assert_allclose(
        s.logprobs, np.take_along_axis(rows, np.array(targets), 1), atol=TOLERANCE
    )
    with pytest.raises(ValueError, match="choose one candidate"):
        s.sum()


def test_a_prompt_as_long_as_the_context(llm, reference):
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompt = random_prompts([llm.llm_engine.model_config.max_model_len], vocab, seed=4)[0]
    (s,) = score(llm, [prompt], use_tqdm=False)
    np.testing.assert_allclose(
        s.logprobs, token_logprobs(reference("llama", prompt), prompt), atol=TOLERANCE
    )


def test_statistics_top_and_temperature(llm, reference):
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts([90, 301], vocab, seed=5)
    temperature = 1.5
    names = ["entropy", "rank", "argmax", "argmax_logprob", "margin", "collision_probability"]
    scores = score(llm, prompts, statistics=names, temperature=temperature, top=5, use_tqdm=False)
    for p, s in zip(prompts, scores, strict=True):
        x = reference("llama", p)[:-1] / temperature
        lp = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
        own = lp[np.arange(len(p) - 1), p[1:]]
        order = np.argsort(-lp, axis=-1, kind="stable")
        best = np.take_along_axis(lp, order[:, :5], 1)
        np.testing.assert_allclose(s.logprobs, own, atol=TOLERANCE)
        np.testing.assert_allclose(
            s.statistics["entropy"], -(np.exp(lp) * lp).sum(-1), atol=TOLERANCE
        )
        np.testing.assert_array_equal(s.statistics["rank"], (lp > own[:, None]).sum(-1) + 1)
        np.testing.assert_array_equal(s.statistics["argmax"], order[:, 0])
        np.testing.assert_allclose(s.statistics["argmax_logprob"], best[:, 0], atol=TOLERANCE)
        np.testing.assert_allclose(s.statistics["margin"], best[:, 0] - best[:, 1], atol=TOLERANCE)
        np.testing.assert_allclose(
            s.statistics["collision_probability"], (np.exp(lp) ** 2).sum(-1), atol=TOLERANCE
        )
        np.testing.assert_array_equal(s.top_token_ids, order[:, :5])
        np.testing.assert_allclose(s.top_logprobs, best, atol=TOLERANCE)


def test_text_is_tokenised_as_vllm_does(llm):
    text = "def function(argument): return argument"
    ids = llm.get_tokenizer()(text)["input_ids"]
    by_text, by_ids, by_prompt = score(llm, [text, ids, {"prompt": text}], use_tqdm=False)
    assert by_text.token_ids.tolist() == ids[1:]
    np.testing.assert_allclose(by_text.logprobs, by_ids.logprobs, atol=2e-6)
    np.testing.assert_allclose(by_text.logprobs, by_prompt.logprobs, atol=2e-6)


def test_bfloat16_errs_less_than_stock(engine, reference):
    """The head's product and the reduction are float32: less error than stock's rounded logits."""
    from vllm import SamplingParams

    llm = engine("llama", {"dtype": "bfloat16"}, dtype="bfloat16")
    vocab = llm.llm_engine.model_config.get_vocab_size()
    prompts = random_prompts([400] * 4, vocab, seed=6)
    scores = score(llm, prompts, use_tqdm=False)
    stock = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
        use_tqdm=False,
    )
    wants = [token_logprobs(reference("llama", p, dtype="bfloat16"), p) for p in prompts]
    ours = np.concatenate([s.logprobs - w for s, w in zip(scores, wants, strict=True)])
    theirs = np.concatenate(
        [
            np.array([o.prompt_logprobs[i][p[i]].logprob for i in range(1, len(p))]) - w
            for o, p, w in zip(stock, prompts, wants, strict=True)
        ]
    )
    assert np.abs(ours).mean() <= 1.02 * np.abs(theirs).mean()
