"""`score_mode=True` alone: the whole vocabulary, as the seed's basic usage reads it."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest

from tests.helpers import random_prompts, token_logprobs
from vllm.score import score

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def prompt(llm):
    return random_prompts([300], llm.llm_engine.model_config.get_vocab_size(), seed=0)[0]


@pytest.fixture(scope="module")
def output(llm, prompt):
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    outputs = llm.generate(
        prompts=[TokensPrompt(prompt_token_ids=prompt)],
        sampling_params=SamplingParams(score_mode=True, temperature=0.0),
    )
    return outputs[0]


def test_basic_usage_of_the_seed(output, prompt, reference):
    total_nll = sum(
        -output.prompt_logprobs[i][prompt[i]].logprob
        for i in range(1, len(prompt))
        if prompt[i] in output.prompt_logprobs[i]
    )
    perplexity = math.exp(total_nll / (len(prompt) - 1))
    want = math.exp(-token_logprobs(reference("llama", prompt), prompt).mean())
    assert perplexity == pytest.approx(want, rel=1e-5)


def test_array_and_view_agree_with_the_reference(output, prompt, reference, llm):
    want = reference("llama", prompt)[:-1]
    assert output.scores.logprobs.dtype == np.float32
    assert output.scores.token_ids is None
    np.testing.assert_allclose(output.scores.logprobs, want, atol=2e-5)
    view = output.prompt_logprobs
    assert len(view) == len(prompt)
    assert view[0] is None
    row = view[-1]
    assert len(row) == want.shape[1]
    first, second = list(row)[:2]
    assert first == prompt[-1]  # as in stock vLLM: the prompt's own token, then by probability
    ranked = np.argsort(-want[-1], kind="stable")
    assert second == next(t for t in ranked.tolist() if t != prompt[-1])
    assert row[int(ranked[4])].rank == 5
    assert row[5].decoded_token == llm.get_tokenizer().convert_ids_to_tokens(5).replace("Ġ", " ")
    assert want.shape[1] not in row and -1 not in row
    with pytest.raises(KeyError):
        row[want.shape[1]]


def test_outputs_travel(output, prompt):
    """Ray and process pools pickle outputs."""
    copy = pickle.loads(pickle.dumps(output))
    np.testing.assert_array_equal(copy.scores.logprobs, output.scores.logprobs)
    token = prompt[3]
    assert copy.prompt_logprobs[3][token].logprob == output.prompt_logprobs[3][token].logprob


def test_nothing_is_generated(output, prompt):
    completion = output.outputs[0]
    assert list(completion.token_ids) == []
    assert completion.text == ""
    assert completion.finish_reason == "length"
    assert output.prompt_token_ids == prompt
    assert output.finished


def test_stock_reads_the_same(llm, prompt):
    """Same mapping as stock prompt_logprobs: keys, values, ranks, decoded tokens."""
    from vllm import SamplingParams

    (stock,) = llm.generate(
        [{"prompt_token_ids": prompt[:40]}],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5),
        use_tqdm=False,
    )
    (ours,) = llm.generate(
        [{"prompt_token_ids": prompt[:40]}],
        SamplingParams(score_mode=True, prompt_logprobs=5, score_statistics=["rank"]),
        use_tqdm=False,
    )
    assert ours.prompt_logprobs[0] is None and stock.prompt_logprobs[0] is None
    for a, b in zip(ours.prompt_logprobs[1:], stock.prompt_logprobs[1:], strict=True):
        assert list(a) == list(b)
        for token in a:
            assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-5)
            assert a[token].rank == b[token].rank
            if "\ufffd" not in a[token].decoded_token:  # part of a character: stock adds context
                assert a[token].decoded_token == b[token].decoded_token


def test_full_vocabulary_through_score(llm, prompt, output):
    (s,) = score(llm, [prompt], full_vocabulary=True, use_tqdm=False)
    np.testing.assert_allclose(s.logprobs, output.scores.logprobs, atol=2e-6)


def test_the_bound_is_an_error_that_says_what_to_do(llm, prompt, monkeypatch):
    from vllm import SamplingParams

    monkeypatch.setenv("VLLM_SCORE_FULL_VOCAB_BYTES", "1000000")
    with pytest.raises(ValueError, match=r"bytes.*target_token_ids"):
        llm.generate(
            [{"prompt_token_ids": prompt}], SamplingParams(score_mode=True), use_tqdm=False
        )
    vocab = llm.llm_engine.model_config.get_vocab_size()
    small = {"prompt_token_ids": prompt[:100]}
    assert 2 * 99 * vocab * 4 < 1_000_000 < 3 * 99 * vocab * 4
    llm.generate([small] * 2, SamplingParams(score_mode=True), use_tqdm=False)
    with pytest.raises(ValueError, match="in use by unfinished requests"):
        llm.generate([small] * 3, SamplingParams(score_mode=True), use_tqdm=False)
    # The refused call took its admitted requests back, and finished ones count no more.
    llm.generate([small] * 2, SamplingParams(score_mode=True), use_tqdm=False)
