"""Where score mode cannot run, a request that says so is refused, and `echo` is stock vLLM's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.helpers import TOLERANCE
from tests.patches.processes import run_script

IDS = [5, 6, 7, 300]


def test_an_engine_that_refuses(serve: Any) -> None:
    with (
        serve(VLLM_SCORE_KERNEL="no such kernel") as address,
        httpx.Client(base_url=address, timeout=120) as client,
    ):

        def post(**body: Any) -> httpx.Response:
            return client.post("/v1/completions", json={"model": "model", "prompt": IDS, **body})

        for stream in (False, True):
            answer = post(score_mode=True, stream=stream)
            assert "VLLM_SCORE_KERNEL" in answer.text and "BadRequestError" in answer.text
            assert answer.status_code == (200 if stream else 400)
        for _ in range(2):
            answer = post(echo=True, max_tokens=0, logprobs=1)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 1
        assert len(answer.json()["choices"][0]["logprobs"]["token_logprobs"]) == len(IDS)


def test_an_engine_that_answers_with_logits(serve: Any, reference: Any) -> None:
    """No list holds log-probabilities of the prompt and a logit of the token."""
    want = reference("llama", IDS)[[0, 1, 2], IDS[1:]]
    with (
        serve("--logprobs-mode", "raw_logits") as address,
        httpx.Client(base_url=address, timeout=120) as client,
    ):

        def post(**body: Any) -> Any:
            body = {"model": "model", "prompt": IDS, "temperature": 0, **body}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        for max_tokens in (0, 1):
            body = {"echo": True, "logprobs": 2, "max_tokens": max_tokens}
            ours, stock = post(**body), post(**body, prompt_logprobs=2)
            assert ours["logprobs"] == stock["logprobs"]
            logits = ours["logprobs"]["token_logprobs"][1:4]
            assert max(logits) > 0 and abs(logits[0] - want[0]) > 1
        scores = post(score_mode=True)["scores"]
        assert scores["logprobs"] == pytest.approx(want.tolist(), abs=TOLERANCE)


def test_a_vllm_that_the_patch_does_not_fit() -> None:
    found = run_script("broken_serving.py")
    for name in ("completion endpoint", "sampling parameters"):
        kind, message = found[name]
        assert kind in ("ScoreModeError", "InvalidScoreRequest")
        assert "vllm.entrypoints.openai.completion.serving" in message
        assert "installed again" in message
    assert found["ordinary"] == "AttributeError"  # reached the stock function of an empty server
    assert found["state"][0] == "failed" and "render_completion_request" in found["state"][1]
