"""Scores inside the worker: which rows of this step belong to score requests, and their results.

Rows: for an engine prompt of L tokens whose first scored row is `start`, row r (the hidden state
at position r) scores the token after it. The engine is given the prompt without its last token
(see `request.py`), so the rows ``[start, L)`` are scored, the last one included.

A step is scored in one go for all requests with the same layout, the results stay on the device,
and those of the requests that are complete go to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vllm.score.engine.host_copy import HostWriter, to_device, to_host
from vllm.score.engine.model_head import head_of
from vllm.score.engine.request_scores import RequestScores
from vllm.score.ops.row_layout import FULL_VOCABULARY, RowLayout
from vllm.score.ops.score_rows import block_rows, score_rows


def scored_rows(begin: int, num_tokens: int, start: int, num_rows: int) -> tuple[int, int]:
    """Rows ``[low, high)`` scored by a step that computes prompt positions
    ``[begin, begin + num_tokens)`` of a request with scored rows ``[start, start + num_rows)``;
    ``low >= high`` when there are none.
    """
    return max(begin, start), min(begin + num_tokens, start + num_rows)


@dataclass
class StepRows:
    """The scored rows of one request in one step: rows ``[low, high)``, whose first hidden state
    is the step's `hidden_first`.
    """

    scores: RequestScores
    hidden_first: int
    low: int
    high: int

    @property
    def count(self) -> int:
        return self.high - self.low

    @property
    def targets(self) -> np.ndarray:
        """int32 [count, k]."""
        start = self.scores.start
        return self.scores.targets[self.low - start : self.high - start]


@dataclass
class Progress:
    """One request's share of a step.

    Attributes:
        begin: prompt positions computed before the step.
        num_tokens: computed in it.
        prompt_len: of the engine's prompt.
        first_index: of the request's first hidden state in the step.
    """

    request_id: str
    scores: RequestScores
    begin: int
    num_tokens: int
    prompt_len: int
    first_index: int


def score_step(
    progress: Iterable[Progress],
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Score one step.

    Args:
        progress: the score requests of the step.
        hidden: [T, H], the step's hidden states.
        compute_logits: the model's head.

    Returns:
        The results float32 [m, width] of the requests that are complete, on the host. On a GPU
        they are valid once the stream has caught up.
    """
    groups: dict[RowLayout, list[StepRows]] = {}
    complete: dict[str, RequestScores] = {}
    # In the order of their hidden states, so that rows that follow each other need no copy.
    for p in sorted(progress, key=lambda p: p.first_index):
        low, high = scored_rows(p.begin, p.num_tokens, p.scores.start, len(p.scores.targets))
        if low < high:
            step = StepRows(p.scores, p.first_index + low - p.begin, low, high)
            groups.setdefault(p.scores.layout, []).append(step)
        if p.begin + p.num_tokens >= p.prompt_len:
            complete[p.request_id] = p.scores
    for layout, members in groups.items():
        if layout.top == FULL_VOCABULARY:
            for step in members:
                _score_whole_vocabulary(step, hidden, compute_logits)
        else:
            _score_group(members, hidden, compute_logits)
    return _to_host(complete)


def _score_group(
    members: list[StepRows],
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Requests with the same layout, together; their results stay on the device."""
    index = np.concatenate([np.arange(s.hidden_first, s.hidden_first + s.count) for s in members])
    targets = np.concatenate([s.targets for s in members])
    blocks = [
        scored
        for _, scored in _score_blocks(members[0].scores, index, targets, hidden, compute_logits)
    ]
    results = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    first = 0
    for step in members:
        step.scores.add(step.low, results[first : first + step.count])
        first += step.count


def _score_whole_vocabulary(
    step: StepRows,
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """One request, whose results go to the host block by block."""
    index = np.arange(step.hidden_first, step.hidden_first + step.count)
    out = step.scores.host_rows(step.low, step.high)
    # The targets are those of the rank.
    blocks = _score_blocks(step.scores, index, step.targets[:, :1], hidden, compute_logits)
    with HostWriter() as writer:
        for rows, scored in blocks:
            writer.write(out[rows], scored)
    step.scores.add(step.low, out)


def _score_blocks(
    scores: RequestScores,
    index: np.ndarray,
    targets: np.ndarray,
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the results of the hidden states `index`, [c, width], a block of rows at a time."""
    layout, vocab_size = scores.layout, scores.vocab_size
    consecutive = int(index[-1]) - int(index[0]) + 1 == len(index)
    first_row = hidden[int(index[0]) : int(index[0]) + 1]
    head, _ = head_of(compute_logits, first_row, index[:1], vocab_size)
    a_row = 0 if consecutive else hidden.element_size() * hidden.shape[1]
    block = block_rows(head, layout, vocab_size, a_row)
    device_targets = to_device(targets.astype(np.int64), hidden.device)
    for first in range(0, len(index), block):
        rows = slice(first, min(first + block, len(index)))
        if consecutive:
            part = hidden[int(index[rows.start]) : int(index[rows.stop - 1]) + 1]
        else:
            part = hidden.index_select(0, to_device(index[rows], hidden.device))
        head, taken = head_of(compute_logits, part, index[rows], vocab_size)
        yield rows, score_rows(head, taken, device_targets[rows], layout, vocab_size)


def _to_host(complete: dict[str, RequestScores]) -> dict[str, torch.Tensor]:
    """The finished results, those on the device in one copy that is not waited for."""
    wholes = {request_id: s.assemble() for request_id, s in complete.items()}
    away = [request_id for request_id, whole in wholes.items() if whole.device.type != "cpu"]
    if away:
        wholes |= zip(away, to_host([wholes[r] for r in away]), strict=True)
    return wholes
