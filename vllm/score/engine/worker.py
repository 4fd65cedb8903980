"""Scores inside the worker: which rows of this step belong to score requests, and their results.

Rows: for an engine prompt of L tokens whose first scored row is `start`, row r (the hidden state
at position r) scores the token after it. The engine is given the prompt without its last token
(see `request.py`), so the rows ``[start, L)`` are scored, the last one included.

A step is scored in one go for all requests with the same layout, the results stay on the device,
and those of the requests that are complete go to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.score.engine.host_copy import to_device, to_host
from vllm.score.engine.layout import FULL_VOCABULARY, RowLayout
from vllm.score.engine.model_head import head_of
from vllm.score.ops.score_rows import block_rows, score_rows


def scored_rows(begin: int, num_tokens: int, start: int, num_rows: int) -> tuple[int, int]:
    """Rows ``[low, high)`` scored by a step that computes prompt positions
    ``[begin, begin + num_tokens)`` of a request with scored rows ``[start, start + num_rows)``;
    ``low >= high`` when there are none.
    """
    return max(begin, start), min(begin + num_tokens, start + num_rows)


@dataclass(eq=False)
class RequestScores:
    """One request's growing scores.

    Attributes:
        layout: what is computed for a row.
        targets: int32 [m, k].
        start: first scored row.
        vocab_size: V, as the front end knows it.
        parts: (first row, results [c, width] on the device, or on the host for the whole
            vocabulary), consecutive.
    """

    layout: RowLayout
    targets: np.ndarray
    start: int
    vocab_size: int
    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, params: Any) -> RequestScores:
        """From the sampling parameters of an admitted score request."""
        return cls(
            layout_of(params),
            params.prompt_logprob_token_ids,
            params.prompt_logprob_start,
            params._score_vocab_size,
        )

    def add(self, low: int, rows: torch.Tensor) -> None:
        """Append the results of the rows from `low` on; a row computed again replaces itself."""
        kept = [(first, part[: low - first]) for first, part in self.parts if first < low]
        self.parts = [*kept, (low, rows)]

    def assemble(self) -> torch.Tensor:
        """Float32 [m, width], NaN where no row was computed."""
        shape = (len(self.targets), self.layout.width(self.vocab_size))
        if len(self.parts) == 1 and self.parts[0][1].shape == shape:
            return self.parts[0][1]
        device = self.parts[0][1].device if self.parts else torch.device("cpu")
        whole = torch.full(shape, float("nan"), dtype=torch.float32, device=device)
        for first, part in self.parts:
            whole[first - self.start : first - self.start + len(part)] = part
        return whole


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
        _score_group(layout, members, hidden, compute_logits)
    return _to_host(complete)


def _score_group(
    layout: RowLayout,
    members: list[StepRows],
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    vocab_size = members[0].scores.vocab_size
    index = np.concatenate([np.arange(s.hidden_first, s.hidden_first + s.count) for s in members])
    targets = np.concatenate([s.targets for s in members])
    if layout.num_targets == 0:
        targets = targets[:, :1]  # the rank's; the whole vocabulary needs none
    results = _score_blocks(layout, index, targets, hidden, compute_logits, vocab_size)
    first = 0
    for step in members:
        step.scores.add(step.low, results[first : first + step.count])
        first += step.count


def _score_blocks(
    layout: RowLayout,
    index: np.ndarray,
    targets: np.ndarray,
    hidden: torch.Tensor,
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
) -> torch.Tensor:
    """Results [len(index), width]: on the device, or on the host for the whole vocabulary."""
    consecutive = int(index[-1]) - int(index[0]) + 1 == len(index)
    first_row = hidden[int(index[0]) : int(index[0]) + 1]
    head, _ = head_of(compute_logits, first_row, index[:1], vocab_size)
    a_row = 0 if consecutive else hidden.element_size() * hidden.shape[1]
    block = block_rows(head, layout, vocab_size, a_row)
    on_host = layout.top == FULL_VOCABULARY
    shape = (len(index), layout.width(vocab_size))
    if on_host:
        results = torch.empty(shape, dtype=torch.float32)
    device_targets = to_device(targets.astype(np.int64), hidden.device)
    blocks = []
    for first in range(0, len(index), block):
        rows = slice(first, min(first + block, len(index)))
        if consecutive:
            part = hidden[int(index[rows.start]) : int(index[rows.stop - 1]) + 1]
        else:
            part = hidden.index_select(0, to_device(index[rows], hidden.device))
        head, taken = head_of(compute_logits, part, index[rows], vocab_size)
        scored = score_rows(head, taken, device_targets[rows], layout, vocab_size)
        if on_host:
            results[rows] = scored.cpu()
        else:
            blocks.append(scored)
    if on_host:
        return results
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _to_host(complete: dict[str, RequestScores]) -> dict[str, torch.Tensor]:
    """The finished results, those on the device in one copy that is not waited for."""
    wholes = {request_id: s.assemble() for request_id, s in complete.items()}
    away = [request_id for request_id, whole in wholes.items() if whole.device.type != "cpu"]
    if away:
        wholes |= zip(away, to_host([wholes[r] for r in away]), strict=True)
    return wholes
