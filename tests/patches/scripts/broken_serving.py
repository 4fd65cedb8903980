"""A release whose completion endpoint changed: requests for scores must not be answered by it."""

from __future__ import annotations

import asyncio
import json
from types import ModuleType
from typing import Any

import wrapt


def rename_a_parameter(module: ModuleType) -> None:
    serving: Any = module.OpenAIServingCompletion
    stock = serving.render_completion_request

    async def render_completion_request(self: Any, body: Any) -> Any:
        return await stock(self, body)

    serving.render_completion_request = render_completion_request


def outcome(call: Any) -> list[str]:
    try:
        result = call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return [type(result).__name__, ""]


def main() -> None:
    target = "vllm.entrypoints.openai.completion.serving"
    # Hooks run in the order in which they were registered: this before ours.
    wrapt.register_post_import_hook(rename_a_parameter, target)
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.score import armed

    empty = object.__new__(OpenAIServingCompletion)  # whatever reads it fails
    score = CompletionRequest(prompt=[1, 2], score_mode=True)
    ordinary = CompletionRequest(prompt=[1, 2])
    states = {a.patch.target: [a.state, a.reason] for a in armed.applications()}
    found = {
        "state": states[target],
        "completion endpoint": outcome(lambda: asyncio.run(empty.create_completion(score))),
        "sampling parameters": outcome(lambda: score.to_sampling_params(16)),
        "ordinary": outcome(lambda: asyncio.run(empty.create_completion(ordinary)))[0],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
