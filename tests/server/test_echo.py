"""`echo` with `logprobs`: served in score mode, and answered as stock vLLM answers.

The stock answer comes from the same server: a request that sets `prompt_logprobs` is left alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers import TOLERANCE, random_prompts, token_logprobs
from tests.server.metrics import finished

TEXT = "class Reader:\n    pass"
SPLIT_CHARACTERS = "naïve 日本語 🙂 é"  # single tokens of these are no text
IDS = [5, 6, 7, 300, 301, 302]
IDS_TEXT = "def write(self, text):"
PROMPTS = [
    pytest.param(TEXT, id="text"),
    pytest.param([TEXT, SPLIT_CHARACTERS], id="texts"),
    pytest.param(IDS, id="ids"),
    pytest.param([IDS, IDS[:2], [9]], id="lists-of-ids"),
]


def assert_same(ours: Any, stock: Any, path: str = "answer") -> None:
    """Equal, floats to rounding."""
    assert type(ours) is type(stock), path
    if isinstance(ours, dict):
        assert list(ours) == list(stock), path
        for key in ours:
            assert_same(ours[key], stock[key], f"{path}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(stock), path
        for i, (a, b) in enumerate(zip(ours, stock, strict=True)):
            assert_same(a, b, f"{path}[{i}]")
    elif isinstance(ours, float):
        assert ours == pytest.approx(stock, abs=TOLERANCE), path
    else:
        assert ours == stock, path


def without_ids(answer: Any) -> Any:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.mark.parametrize("logprobs", [0, 3, 20])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_answer_is_stocks_but_for_the_dropped_token(
    complete: Any, prompt: Any, logprobs: int
) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": logprobs}
    ours = without_ids(complete(**body))
    stock = without_ids(complete(**body, prompt_logprobs=logprobs))
    usage, dropped = ours.pop("usage"), stock.pop("usage")
    assert_same(ours, stock)
    assert usage["prompt_tokens"] == usage["total_tokens"] == dropped["prompt_tokens"]
    # Stock generates a token for each prompt, and drops it.
    assert (usage["completion_tokens"], dropped["completion_tokens"]) == (0, len(ours["choices"]))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "seed": 1234},
        {"temperature": 1, "seed": 7},
        {"temperature": 0, "return_token_ids": True, "return_tokens_as_token_ids": True},
        {"temperature": 0, "logit_bias": {"40": 100}},
        {"temperature": 0, "ignore_eos": True, "stop": ["a"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_token_beside_the_prompt_is_generated_as_by_stock(
    complete: Any, prompt: Any, options: dict[str, Any]
) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": 1, "logprobs": 2, **options}
    assert_same(without_ids(complete(**body)), without_ids(complete(**body, prompt_logprobs=2)))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"return_tokens_as_token_ids": True},
        {"return_token_ids": True},
        {"add_special_tokens": False},
        {"truncate_prompt_tokens": 4},
        {"truncate_prompt_tokens": 4, "truncation_side": "left"},
        {"n": 2},
        {"best_of": 2},
        {"suffix": "end"},
        {"frequency_penalty": 1.5, "presence_penalty": 1.0, "repetition_penalty": 1.3},
        {"logit_bias": {"40": 5}},
        {"min_p": 0.5, "top_k": 3, "top_p": 0.5},
        {"stop_token_ids": [40], "min_tokens": 1},
        {"bad_words": ["a"]},
        {"cache_salt": "salt"},
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        {"stream_options": {"include_usage": True}},
        {"prompt_embeds": "AAAA"},
        {"priority": 1},
        {"logprobs": 1024},
    ],
    ids=str,
)
def test_every_setting_as_with_stock(client: Any, options: dict[str, Any], max_tokens: int) -> None:
    body = {"model": "model", "prompt": [TEXT, IDS_TEXT], "echo": True, "max_tokens": max_tokens}
    body |= {"logprobs": 2, "temperature": 0, "seed": 1, **options}
    ours = client.post("/v1/completions", json=body)
    stock = client.post("/v1/completions", json={**body, "prompt_logprobs": body["logprobs"]})
    assert ours.status_code == stock.status_code, ours.text
    found, expected = without_ids(ours.json()), without_ids(stock.json())
    if ours.status_code == 200:
        assert len(found["choices"]) == 2 * options.get("n", 1)
        for choice, other in zip(found["choices"], expected["choices"], strict=True):
            # Stock gives the prompt's numbers twice where it is asked for them twice.
            choice.pop("prompt_logprobs")
            other.pop("prompt_logprobs")
            if max_tokens == 0:  # stock speaks of the token that it drops
                for field in ("token_ids", "finish_reason", "stop_reason"):
                    choice.pop(field)
                    other.pop(field)
        if max_tokens == 0:
            found.pop("usage")
            expected.pop("usage")
    assert_same(found, expected)


@pytest.mark.parametrize("asked", [{"max_tokens": 1}, {}, {"max_tokens": 7}], ids=str)
def test_a_prompt_that_fills_the_context(
    complete: Any, refused: Any, asked: dict[str, Any]
) -> None:
    ids = [4] * 2048
    body = {"prompt": ids, "echo": True, "logprobs": 1}
    for extra in ({}, {"echo": False, "logprobs": None}):
        message = refused(**{**body, **asked, **extra})
        assert "leaves no room for" in message and "send max_tokens=0 with echo=true" in message
    assert len(complete(**body, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == 2048
    if not asked:
        return
    assert "only allowed in score_mode" in refused(prompt=ids, max_tokens=0)


def test_a_token_costs_the_engine_a_second_request(complete: Any, client: Any) -> None:
    before = finished(client)
    complete(prompt=IDS, echo=True, max_tokens=0, logprobs=1)
    complete(prompt=IDS, echo=True, max_tokens=1, logprobs=1)
    assert finished(client) - before == 3
    complete(prompt=IDS, echo=True, max_tokens=1, logprobs=1, prompt_logprobs=1)
    assert finished(client) - before == 4


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_stream_is_stocks(events: Any, prompt: Any, max_tokens: int) -> None:
    body = {"prompt": prompt, "echo": True, "max_tokens": max_tokens, "logprobs": 0}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    ours = [without_ids(e) for e in events(**body)]
    stock = [without_ids(e) for e in events(**body, prompt_logprobs=0)]
    prompts = len(stock) - 1
    usage, dropped = ours[-1].pop("usage"), stock[-1].pop("usage")
    assert usage["prompt_tokens"] == dropped["prompt_tokens"]
    assert usage["completion_tokens"] == max_tokens * prompts
    for found in (ours, stock):  # prompts of a list finish in any order
        found.sort(key=lambda e: [c["index"] for c in e["choices"]])
    assert_same(ours, stock)


@pytest.mark.parametrize("length", [1, 2, 31, 700, 2048])
def test_every_token_against_float64(complete: Any, reference: Any, length: int) -> None:
    (ids,) = random_prompts([length], 1024, seed=length)
    answer = complete(prompt=ids, echo=True, max_tokens=0, logprobs=1)
    assert answer["usage"]["prompt_tokens"] == length
    found = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert found[0] is None and len(found) == length
    want = token_logprobs(reference("llama", ids), ids)
    np.testing.assert_allclose(found[1:], want, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 2},
        {"logprobs": None},
        {"logit_bias": {"40": 100}},
        {"allowed_token_ids": [40]},
        {"prompt_logprobs": 2},
        {"structured_outputs": {"regex": "a+"}},
    ],
    ids=str,
)
def test_other_requests_stay_with_stock(complete: Any, options: dict[str, Any]) -> None:
    body = {"prompt": IDS, "echo": True, "max_tokens": 0, "logprobs": 1, **options}
    assert complete(**body)["usage"]["completion_tokens"] == options.get("n", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 21}, "max allowed: 20"),
        ({"logprobs": -2}, "positive value or -1"),
        ({"logprobs": "many"}, "must be an integer"),
        ({"prompt": [10**6]}, "10000"),
        ({"prompt": [4] * 2049}, "2048"),
        ({"logprob_token_ids": [4]}, "logprob_token_ids"),
        ({"use_beam_search": True}, "beam search"),
        ({"echo": False}, "max_tokens=0 is only allowed in score_mode"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(refused: Any, options: dict[str, Any], message: str) -> None:
    body = {"prompt": IDS, "echo": True, "max_tokens": 0, "logprobs": 1, **options}
    assert message in refused(**body)
