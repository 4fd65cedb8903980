"""Where score mode cannot run, a request that says so is refused, and `echo` is stock vLLM's."""

from __future__ import annotations

from typing import Any

import httpx

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


def test_a_vllm_that_the_patch_does_not_fit() -> None:
    found = run_script("broken_serving.py")
    for name in ("completion endpoint", "sampling parameters"):
        kind, message = found[name]
        assert kind in ("ScoreModeError", "InvalidScoreRequest")
        assert "vllm.entrypoints.openai.completion.serving" in message
        assert "installed again" in message
    assert found["ordinary"] == "AttributeError"  # reached the stock function of an empty server
    assert found["state"][0] == "failed" and "render_completion_request" in found["state"][1]
