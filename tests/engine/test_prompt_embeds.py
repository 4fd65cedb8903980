"""Prompts given as embeddings: scores of explicit targets, against Hugging Face in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import random_prompts, token_logprobs
from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine

# A model of its own: such an engine adds a token to the tokenizer, which vLLM shares by path.
MODEL = {"seed": 8}
SIZE, VOCABULARY = 128, 1024
TOLERANCE = 1e-4  # nats


@pytest.fixture(scope="module")
def embeds_llm(engine: Callable[..., Any]) -> Any:
    """Steps of 256 positions, so that the longer prompts are computed in parts."""
    return engine("llama", MODEL, enable_prompt_embeds=True, max_model_len=512)


@pytest.fixture(scope="module")
def hf(model_dir: Callable[..., Any]) -> Any:
    from transformers import AutoModelForCausalLM

    folder = model_dir("llama", **MODEL)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def log_softmax(hf: Any, embeds: torch.Tensor) -> np.ndarray:
    """Float64 [n, V] of a prompt of embeddings, [n, H]."""
    with torch.no_grad():
        return hf(inputs_embeds=embeds.double()[None]).logits[0].log_softmax(-1).numpy()


def random_embeds(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def score_params(**options: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, **options)


def test_targets_behind_embeddings(embeds_llm, hf):
    embeds = [random_embeds(count, seed=count) for count in (2, 40, 511, 512)]
    (targets,) = random_prompts([600], VOCABULARY, seed=1)
    requests = [{"prompt_embeds": e, "target_token_ids": targets[: len(e) // 2]} for e in embeds]
    requests.append({"prompt_token_ids": targets[:30]})  # beside them in the same steps
    scores = score(embeds_llm, requests, statistics=["entropy"], top=2, use_tqdm=False)
    for e, request, found in zip(embeds, requests[:-1], scores[:-1], strict=True):
        rows = log_softmax(hf, e)[len(e) - len(found) - 1 : -1]
        ids = request["target_token_ids"]
        assert found.start == len(e) - len(ids)
        assert found.token_ids.tolist() == ids
        np.testing.assert_allclose(found.logprobs, rows[np.arange(len(ids)), ids], atol=TOLERANCE)
        entropy = -(np.exp(rows) * rows).sum(1)
        np.testing.assert_allclose(found.statistics["entropy"], entropy, atol=TOLERANCE)
        np.testing.assert_allclose(found.top_logprobs[:, 0], rows.max(1), atol=TOLERANCE)
    with torch.no_grad():
        plain = hf(torch.tensor([targets[:30]])).logits[0].log_softmax(-1).numpy()
    expected = token_logprobs(plain, targets[:30])
    np.testing.assert_allclose(scores[-1].logprobs, expected, atol=TOLERANCE)


def test_candidates_and_stock_form(embeds_llm, hf):
    """`LLM.generate` takes the same prompts; a batch of one is a prompt."""
    embeds, candidates = random_embeds(50, seed=1), [[3, 4, 5], [6, 7, 8]]
    prompt = {"prompt_embeds": embeds[None], "target_token_ids": candidates}
    (output,) = embeds_llm.generate([prompt], score_params(), use_tqdm=False)
    rows = log_softmax(hf, embeds)[47:49]
    expected = np.take_along_axis(rows, np.array(candidates), axis=1)
    np.testing.assert_allclose(output.scores.logprobs, expected, atol=TOLERANCE)
    assert output.prompt_token_ids == [0] * 50  # as stock vLLM has them
    assert output.prompt_logprobs[47] is None
    assert output.prompt_logprobs[48][4].logprob == pytest.approx(expected[0, 1], abs=TOLERANCE)
    assert output.outputs[0].token_ids == []


def test_prefixes_of_embeddings_are_shared(embeds_llm, hf):
    """The cache goes by the embeddings: the ids of all such prompts are alike."""
    shared, tails = random_embeds(200, seed=2), [random_embeds(20, seed=s) for s in (3, 4)]
    prompts = [torch.cat([shared, tail]) for tail in tails] + [random_embeds(220, seed=5)]
    cached = []
    for embeds in prompts:
        prompt = {"prompt_embeds": embeds, "target_token_ids": [9] * 10}
        (output,) = embeds_llm.generate([prompt], score_params(), use_tqdm=False)
        expected = log_softmax(hf, embeds)[209:219, 9]
        np.testing.assert_allclose(output.scores.logprobs, expected, atol=TOLERANCE)
        cached.append(output.num_cached_tokens)
    assert cached[0] == cached[2] == 0
    assert 0 < cached[1] <= 200


def test_tokens_between_embeddings(embeds_llm, hf):
    ids, embeds = list(range(10, 70)), random_embeds(60, seed=6)
    tokens = np.arange(60) % 3 > 0
    with torch.no_grad():
        mixed = hf.get_input_embeddings()(torch.tensor(ids))
        mixed[~tokens] = embeds[~tokens].double()
    request = {
        "prompt_embeds": embeds,
        "prompt_token_ids": ids,
        "prompt_is_token_ids": tokens.tolist(),
        "target_token_ids": ids[-20:],
    }
    (found,) = score(embeds_llm, [request], use_tqdm=False)
    expected = token_logprobs(log_softmax(hf, mixed), ids)[-20:]
    np.testing.assert_allclose(found.logprobs, expected, atol=TOLERANCE)


EMBEDS = torch.zeros(4, SIZE)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt_embeds": EMBEDS}, "has no tokens of its own to score: give target_token_ids"),
        (
            {"prompt_embeds": EMBEDS, "target_token_ids": [5] * 4},
            "target_token_ids has 4 rows, but a prompt of 4 tokens has 3",
        ),
        ({"prompt_embeds": EMBEDS[:0], "target_token_ids": [5]}, "the prompt has no token"),
        (
            {"prompt_embeds": EMBEDS[:, 1:], "target_token_ids": [5]},
            r"of shape \(4, 127\): give floats of shape \[n, 128\]",
        ),
        ({"prompt_embeds": EMBEDS.int(), "target_token_ids": [5]}, "is torch.int32 of shape"),
        ({"prompt_embeds": torch.zeros(4), "target_token_ids": [5]}, "must be of shape"),
        ({"prompt_embeds": [[0.0]], "target_token_ids": [5]}, "list; give a torch.Tensor"),
        (
            {"prompt_embeds": torch.zeros(513, SIZE), "target_token_ids": [5]},
            "maximum context length is 512 tokens",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_token_ids": [1] * 4, "target_token_ids": [5]},
            "prompt_token_ids stands alone beside prompt_embeds",
        ),
        (
            {"prompt_embeds": EMBEDS, "prompt_is_token_ids": [True] * 4, "target_token_ids": [5]},
            "prompt_is_token_ids stands alone beside prompt_embeds",
        ),
        (
            {
                "prompt_embeds": EMBEDS,
                "prompt_token_ids": [1] * 3,
                "prompt_is_token_ids": [True] * 3,
                "target_token_ids": [5],
            },
            "has 3 and prompt_is_token_ids 3 positions, prompt_embeds 4",
        ),
        ({"prompt_embeds": EMBEDS, "prompt": "a"}, "has prompt_embeds and prompt, of which"),
        (
            {"prompt_token_ids": [1, 2], "prompt_is_token_ids": [True, True]},
            "prompt_is_token_ids, but no prompt_embeds",
        ),
    ],
)
def test_what_cannot_be_scored(embeds_llm, request_, message):
    with pytest.raises(ScoreModeError, match=f"requests\\[0\\].*{message}"):
        score(embeds_llm, [request_], use_tqdm=False)


def test_generate_refuses_alike(embeds_llm):
    with pytest.raises(ScoreModeError, match="has no tokens of its own to score"):
        embeds_llm.generate([{"prompt_embeds": EMBEDS}], score_params(), use_tqdm=False)
    bad = {"prompt_embeds": EMBEDS[:, 1:], "target_token_ids": [5]}
    with pytest.raises(ScoreModeError, match="give floats of shape"):
        embeds_llm.generate([bad], score_params(), use_tqdm=False)
    assert not embeds_llm.llm_engine.has_unfinished_requests()


def test_an_engine_without_embeddings_says_so(llm):
    with pytest.raises(ScoreModeError, match=r"requests\[0\].*--enable-prompt-embeds"):
        score(llm, [{"prompt_embeds": EMBEDS, "target_token_ids": [5]}], use_tqdm=False)
