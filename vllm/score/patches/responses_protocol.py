"""`/v1/responses`: score fields are refused, which this endpoint would ignore."""

from __future__ import annotations

from vllm.score.patches.patch import Patch
from vllm.score.server.elsewhere import refuse_score_fields

PATCH = Patch(
    target="vllm.entrypoints.openai.responses.protocol",
    contract={
        "ResponsesRequest.to_sampling_params": ("self", "default_max_tokens"),
    },
    apply=lambda module: refuse_score_fields(module, "ResponsesRequest", ("max_output_tokens",)),
    roles=("front end",),
    why="A request that says score_mode must not be answered by ordinary generation.",
    how="The place where fields become sampling parameters raises, which is a 400.",
    risk="None known.",
    upstream="Not needed in a merged fork that knows the fields.",
    remove_when="ResponsesRequest has the fields, or refuses unknown ones.",
)
