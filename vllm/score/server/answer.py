"""Scores in the server's answers and events: in the form of stock prompt log-probabilities, and as
plain lists.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from vllm.exceptions import GenerationError
from vllm.score.engine.output import EveryId
from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores
from vllm.score.server.request import score_fields

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


def stock_prompt_logprobs(scores: TokenScores, tokenizer: Any) -> list[Any]:
    """What stock vLLM returns as `prompt_logprobs`, made by its own code.

    Args:
        scores: of all tokens of a prompt but the first, with the statistic `rank`.
        tokenizer: for the texts of the tokens; None leaves them out.

    Returns:
        None for the first token, then a dict of token id to `Logprob` for each.
    """
    import torch

    from vllm.logprobs import create_prompt_logprobs
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsTensors

    assert scores.token_ids is not None
    ids, values = scores.token_ids[:, None], scores.logprobs[:, None]
    if scores.top_token_ids is not None and scores.top_logprobs is not None:
        ids = np.hstack([ids, scores.top_token_ids])
        values = np.hstack([values, scores.top_logprobs])
    processor = LogprobsProcessor(
        tokenizer=None if tokenizer is None else EveryId(tokenizer),
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(False),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=ids.shape[1] - 1,
    )
    tensors = LogprobsTensors(
        torch.from_numpy(ids),
        torch.from_numpy(np.ascontiguousarray(values)),
        torch.from_numpy(scores.statistics["rank"]),
    )
    processor.update_from_output(
        EngineCoreOutput("", new_token_ids=[], new_prompt_logprobs_tensors=tensors)
    )
    found: list[Any] = processor.prompt_logprobs
    return found


def scores_object(scores: TokenScores, statistics: Sequence[str]) -> dict[str, Any]:
    """The `scores` of a choice: the fields of `TokenScores` as lists, ready for JSON.

    Args:
        scores: of one request.
        statistics: the names that were asked for.

    Returns:
        ``start`` (prompt position of the first score), ``token_ids`` [m] or [m][k] (null for the
        whole vocabulary), ``logprobs`` [m], [m][k] or [m][V], ``statistics`` by name [m];
        ``top_token_ids`` and ``top_logprobs`` [m][N] when `prompt_logprobs` asked for N;
        ``notes`` where there are any.
    """
    found: dict[str, Any] = {
        "start": scores.start,
        "token_ids": None if scores.token_ids is None else scores.token_ids.tolist(),
        "logprobs": _finite(scores.logprobs),
        "statistics": {name: _finite(scores.statistics[name]) for name in statistics},
    }
    if scores.top_token_ids is not None and scores.top_logprobs is not None:
        found["top_token_ids"] = scores.top_token_ids.tolist()
        found["top_logprobs"] = _finite(scores.top_logprobs)
    if scores.notes:
        found["notes"] = list(scores.notes)
    return found


def _finite(values: np.ndarray) -> list[Any]:
    if values.dtype.kind == "f":
        values = np.nan_to_num(values, nan=np.nan, neginf=LOWEST, posinf=-LOWEST)
    listed: list[Any] = values.tolist()
    return listed


def events_with_scores(stock: Callable[..., AsyncGenerator[str, None]]) -> Any:
    """`completion_stream_generator` for score requests: each choice of an event with its scores.

    Args:
        stock: `completion_stream_generator`.
    """

    async def events(
        request: Any,
        engine_inputs: Any,
        result_generator: AsyncIterator[tuple[int, Any]],
        *args: Any,
        **kwargs: Any,
    ) -> AsyncGenerator[str, None]:
        fields = score_fields(request)
        names = (fields and fields.score_statistics) or []
        scores: dict[int, dict[str, Any]] = {}

        async def noted() -> AsyncGenerator[tuple[int, Any], None]:
            async for index, output in result_generator:  # one per prompt
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

    return events


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
