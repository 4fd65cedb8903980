"""`/v1/chat/completions`: score fields are refused, which this endpoint would ignore."""

from __future__ import annotations

from vllm.score.patches.patch import Patch
from vllm.score.server.elsewhere import refuse_score_fields

PATCH = Patch(
    target="vllm.entrypoints.openai.chat_completion.protocol",
    contract={
        "ChatCompletionRequest.to_sampling_params": (
            "self",
            "max_tokens",
            "default_sampling_params",
        ),
    },
    apply=lambda module: refuse_score_fields(
        module, "ChatCompletionRequest", ("max_completion_tokens", "max_tokens")
    ),
    roles=("front end",),
    why="A request that says score_mode must not be answered by ordinary generation.",
    how="The place where fields become sampling parameters raises, which is a 400.",
    risk="None known.",
    upstream="Not needed in a merged fork that knows the fields.",
    remove_when="ChatCompletionRequest has the fields, or refuses unknown ones.",
)
