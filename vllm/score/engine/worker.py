"""Scores inside the worker: which rows of this step belong to score requests, and their buffers.

Rows: for an engine prompt of L tokens whose first scored row is `start`, row r (the hidden state
at position r) scores the token after it. The engine is given the prompt without its last token
(see `request.py`), so the rows ``[start, L)`` are scored, the last one included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.score.engine.layout import RowLayout
from vllm.score.ops.head import float32_logits, prefers_float32_product
from vllm.score.ops.score_rows import score_chunks


def scored_rows(begin: int, num_tokens: int, start: int, num_rows: int) -> tuple[int, int]:
    """Rows ``[low, high)`` scored by a step that computes prompt positions
    ``[begin, begin + num_tokens)`` of a request with scored rows ``[start, start + num_rows)``;
    ``low >= high`` when there are none.
    """
    return max(begin, start), min(begin + num_tokens, start + num_rows)


@dataclass
class RequestScores:
    """One request's growing scores.

    Attributes:
        rows: float32 [m, width], NaN where nothing has been written yet. Rows are overwritten
            when a preempted request is computed again.
    """

    layout: RowLayout
    targets: np.ndarray
    start: int
    rows: torch.Tensor = field(init=False)

    def allocate(self, vocab_size: int) -> None:
        width = self.layout.width(vocab_size)
        self.rows = torch.full((len(self.targets), width), float("nan"), dtype=torch.float32)


def layout_of(params: Any) -> RowLayout:
    """The layout that the admitted sampling parameters of a score request describe."""
    full = params._score_top < 0
    return RowLayout(
        num_targets=0 if full else params.prompt_logprob_token_ids.shape[1],
        statistics=tuple(params.score_statistics or ()),
        top=params._score_top,
        temperature=params.score_temperature,
    )


@dataclass
class StepRows:
    """The scored rows of one request in one step: hidden-state indices and the slice of scores."""

    scores: RequestScores
    hidden_first: int
    low: int
    high: int

    @property
    def count(self) -> int:
        return self.high - self.low


def score_step(
    steps: list[StepRows],
    hidden: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
) -> None:
    """Score the rows of all requests of a step, requests with equal layouts in one batch.

    Args:
        steps: the rows; `hidden_first` is the index of row `low` in `hidden`.
        hidden: [T, H], the step's hidden states.
        logits_of: the model's head.
        vocab_size: V.
    """
    groups: dict[RowLayout, list[StepRows]] = {}
    for step in steps:
        if step.count > 0:
            groups.setdefault(step.scores.layout, []).append(step)
    for layout, members in groups.items():
        index = np.concatenate(
            [np.arange(s.hidden_first, s.hidden_first + s.count) for s in members]
        )
        targets = np.concatenate(
            [s.scores.targets[s.low - s.scores.start : s.high - s.scores.start] for s in members]
        )
        chunks = score_chunks(
            logits_of,
            hidden,
            torch.from_numpy(index).to(hidden.device),
            torch.from_numpy(targets.astype(np.int64)).to(hidden.device),
            layout,
            vocab_size,
        )
        with float32_logits(prefers_float32_product(hidden.dtype, hidden.device)):
            _write_chunks(chunks, members)


def _write_chunks(chunks: Iterable[torch.Tensor], members: list[StepRows]) -> None:
    """Copy consecutive chunks of rows into the requests' buffers, which they fill in order."""
    views = iter([s.scores.rows[s.low - s.scores.start : s.high - s.scores.start] for s in members])
    view = next(views)
    for chunk in chunks:
        scored = chunk.cpu()
        while len(scored):
            if not len(view):
                view = next(views)
            count = min(len(view), len(scored))
            view[:count] = scored[:count]
            view, scored = view[count:], scored[count:]


def collect_step(
    num_scheduled: Mapping[str, int],
    request_of: Callable[[str], Any],
    first_index_of: Callable[[str], int],
    vocab_size: int,
) -> tuple[list[StepRows], dict[str, RequestScores]]:
    """The scored rows of a step and the requests whose last row is among them.

    Args:
        num_scheduled: tokens computed this step, by request id.
        request_of: the worker's state of a request: `sampling_params`, `num_computed_tokens`
            (at the start of this step), `prompt_token_ids`.
        first_index_of: index of the request's first hidden state of this step.
        vocab_size: V.
    """
    steps: list[StepRows] = []
    complete: dict[str, RequestScores] = {}
    for request_id, num_tokens in num_scheduled.items():
        request = request_of(request_id)
        params = None if request is None else request.sampling_params
        if params is None or not params.score_mode:
            continue
        scores = getattr(request, "score_buffer", None)
        if scores is None:
            scores = RequestScores(
                layout_of(params), params.prompt_logprob_token_ids, params.prompt_logprob_start
            )
            scores.allocate(vocab_size)
            request.score_buffer = scores
        begin = request.num_computed_tokens
        low, high = scored_rows(begin, num_tokens, scores.start, len(scores.targets))
        if low < high:
            steps.append(StepRows(scores, first_index_of(request_id) + low - begin, low, high))
        if begin + num_tokens >= len(request.prompt_token_ids):
            complete[request_id] = scores
    return steps, complete
