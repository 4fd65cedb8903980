"""Scores in the server's answers and events: in the form of stock prompt log-probabilities, and as
plain lists.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import numpy as np

from vllm.exceptions import GenerationError
from vllm.score.errors import ScoreModeError
from vllm.score.results import EveryId, PromptLogprobsView, TokenScores

# What the stock server sends for minus infinity, which JSON does not know.
LOWEST = -9999.0


def scores_of(output: Any) -> TokenScores:
    """The scores of a finished request's output.

    Raises:
        GenerationError: there are none, or they are unsound; answered with status 500.
    """
    if output is None or output.scores is None:
        raise GenerationError("the request was aborted before it was scored.")
    try:
        len(output.scores)  # failed scores raise their reason
    except ScoreModeError as error:
        raise GenerationError(str(error)) from error
    scores: TokenScores = output.scores
    return scores


def stock_prompt_logprobs(view: PromptLogprobsView, tokenizer: Any) -> list[Any]:
    """What stock vLLM returns as `prompt_logprobs`, made by its own code.

    Args:
        view: of the scores of all tokens of a prompt but the first, with their ranks.
        tokenizer: for the texts of the tokens; None leaves them out.

    Returns:
        None for the first token, then a dict of token id to `Logprob` for each.
    """
    import torch

    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    s = view.scores
    ids = np.column_stack([a for a in (s.token_ids, s.top_token_ids) if a is not None])
    values = np.column_stack([a for a in (s.logprobs, s.top_logprobs) if a is not None])
    processor = LogprobsProcessor(
        tokenizer=None if tokenizer is None else EveryId(tokenizer),
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(False),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=ids.shape[1] - 1,
    )
    tensors = LogprobsTensors(*map(torch.from_numpy, (ids, values, view.ranks)))
    processor.update_from_output(
        EngineCoreOutput("", new_token_ids=[], new_prompt_logprobs_tensors=tensors)
    )
    found: list[Any] = processor.prompt_logprobs
    return found


def scores_object(scores: TokenScores) -> dict[str, Any]:
    """The `scores` of a choice: the fields of `TokenScores` as lists, ready for JSON.

    Returns:
        ``start`` (prompt position of the first score), ``token_ids`` [m] or [m][k] (null for the
        whole vocabulary), ``logprobs`` [m], [m][k] or [m][V], ``statistics`` by name [m];
        ``top_token_ids`` and ``top_logprobs`` [m][N] when `prompt_logprobs` asked for N;
        ``notes`` where there are any.
    """
    found = {
        "start": scores.start,
        "token_ids": _listed(scores.token_ids),
        "logprobs": _listed(scores.logprobs),
        "statistics": {name: _listed(values) for name, values in scores.statistics.items()},
    }
    more = {
        "top_token_ids": _listed(scores.top_token_ids),
        "top_logprobs": _listed(scores.top_logprobs),
        "notes": list(scores.notes) or None,
    }
    return found | {name: value for name, value in more.items() if value is not None}


def _listed(values: np.ndarray | None) -> Any:
    if values is not None and values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=np.nan, neginf=LOWEST, posinf=-LOWEST)
    return None if values is None else values.tolist()


async def events_with_scores(
    stock: Callable[..., AsyncGenerator[str, None]],
    request: Any,
    result_generator: AsyncIterator[tuple[int, Any]],
) -> AsyncGenerator[str, None]:
    """The events of a score request, each choice with its scores.

    Args:
        stock: `completion_stream_generator`, which takes the other two by name.
        request: the `CompletionRequest`.
        result_generator: (index of the prompt, its `RequestOutput`).
    """
    scores: dict[int, dict[str, Any]] = {}

    async def noted() -> AsyncGenerator[tuple[int, Any], None]:
        async for index, output in result_generator:  # one per prompt
            scores[index] = scores_object(scores_of(output))
            yield index, output

    remove: list[str] = []
    if not request.echo:
        # Stock sends no event for an empty text, but one for an echo of token ids.
        if not request.return_token_ids:
            remove = ["prompt_token_ids", "token_ids"]
        request = request.model_copy(update={"echo": True, "return_token_ids": True})
    async for event in stock(request=request, result_generator=noted()):
        yield _with_scores(event, scores, remove)


def _with_scores(event: str, scores: dict[int, dict[str, Any]], remove: list[str]) -> str:
    prefix = "data: "
    try:
        content = json.loads(event.removeprefix(prefix))
    except ValueError:
        return event  # [DONE]
    choices = content.get("choices")
    if not choices:
        return event
    for choice in choices:
        for name in remove:
            choice.pop(name, None)
        choice["scores"] = scores[choice["index"]]
    return f"{prefix}{json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
