"""Endpoints that do not score say so, instead of generating."""

from __future__ import annotations

import pytest

from vllm.score import ScoreModeError


def chat(**fields):
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    message = {"role": "user", "content": "a"}
    return ChatCompletionRequest(model="m", messages=[message], **fields)


def responses(**fields):
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return ResponsesRequest(model="m", input="a", **fields)


@pytest.mark.parametrize("make", [chat, responses])
@pytest.mark.parametrize("fields", [{"score_mode": True}, {"target_token_ids": [1]}])
def test_score_fields_are_refused(make, fields):
    with pytest.raises(ScoreModeError, match="only served by /v1/completions"):
        make(**fields).to_sampling_params(5, {})
    assert make(score_mode=False).to_sampling_params(5, {}).max_tokens == 5
    assert make().to_sampling_params(5, {}).max_tokens == 5


@pytest.mark.parametrize(
    ("make", "limit"),
    [(chat, "max_tokens"), (chat, "max_completion_tokens"), (responses, "max_output_tokens")],
)
def test_a_prompt_that_fills_the_context(make, limit):
    """The endpoints compute that 0 tokens are left, whatever was asked for."""
    for fields in ({}, {limit: 7}):
        with pytest.raises(ScoreModeError, match="leaves no room for"):
            make(**fields).to_sampling_params(0, {})
