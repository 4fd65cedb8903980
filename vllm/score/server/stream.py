"""Scores in the events of a streamed completion."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from vllm.score.server.answer import scores_object, scores_of
from vllm.score.server.body import score_fields

PREFIX = "data: "


async def events_with_scores(
    stock: Callable[..., AsyncGenerator[str, None]],
    request: Any,
    engine_inputs: Any,
    result_generator: AsyncIterator[tuple[int, Any]],
    *args: Any,
    **kwargs: Any,
) -> AsyncGenerator[str, None]:
    """The stock events of a score request, each choice with its scores.

    Args:
        stock: `completion_stream_generator`.
        request: with ``score_mode: true``.
        result_generator: (index of the prompt, output), one a prompt.
    """
    fields = score_fields(request)
    names = (fields and fields.score_statistics) or []
    scores: dict[int, dict[str, Any]] = {}

    async def noted() -> AsyncGenerator[tuple[int, Any], None]:
        async for index, output in result_generator:
            scores[index] = scores_object(scores_of(output), names)
            yield index, output

    remove: list[str] = []
    if not request.echo:
        # Stock sends no event for an empty text, but one for an echo of token ids.
        if not request.return_token_ids:
            remove = ["prompt_token_ids", "token_ids"]
        request = request.model_copy(update={"echo": True, "return_token_ids": True})
    async for event in stock(request, engine_inputs, noted(), *args, **kwargs):
        yield _with_scores(event, scores, remove)


def _with_scores(event: str, scores: dict[int, dict[str, Any]], remove: list[str]) -> str:
    try:
        content = json.loads(event.removeprefix(PREFIX))
    except ValueError:
        return event  # [DONE]
    choices = content.get("choices")
    if not choices:
        return event
    for choice in choices:
        for name in remove:
            choice.pop(name, None)
        choice["scores"] = scores[choice["index"]]
    return f"{PREFIX}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
