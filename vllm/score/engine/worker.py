"""Scores inside the worker: which rows of a step belong to score requests, and their results.

Rows: for an engine prompt of L tokens whose first scored row is `start`, row r (the hidden state
at position r) scores the token after it. The engine is given the prompt without its last token
(see `request.py`), so the rows ``[start, L)`` are scored, the last one included.

A step is scored in one go for all requests with the same layout, the results stay on the device,
and those of the requests that are complete go to the host in one copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from vllm.score.engine.model_head import ComputeLogits, head_of, to_device
from vllm.score.engine.request import ScoreSpec
from vllm.score.ops.score_rows import block_rows, score_rows
from vllm.score.ops.statistics import FULL_VOCABULARY, RowLayout


@dataclass(eq=False)
class RequestScores:
    """One request's growing scores.

    Attributes:
        spec: of the request.
        parts: (first row, results [c, width]) of what was computed, in order. They lie on the
            device, and for the whole vocabulary in `buffer`.
        buffer: float32 [m, width] on the host, for the whole vocabulary only: its rows are too many
            to wait on the device.
        spoiled: the model was not computed as it should have been; every score is NaN.
    """

    spec: ScoreSpec
    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    buffer: torch.Tensor | None = None
    spoiled: bool = False

    def add(self, low: int, rows: torch.Tensor) -> None:
        """Append the results of the rows from `low` on; a row computed again replaces itself."""
        kept = [(first, part[: low - first]) for first, part in self.parts if first < low]
        self.parts = [*kept, (low, rows)]

    def host_rows(self, low: int, high: int) -> torch.Tensor:
        """The buffer's rows ``[low, high)``, to be written and then added."""
        if self.buffer is None:
            # NumPy asks for huge pages, which saves most of the time of touching a gigabyte.
            self.buffer = torch.from_numpy(np.empty(self.spec.result_shape, dtype=np.float32))
        return self.buffer[low - self.spec.start : high - self.spec.start]

    def assemble(self) -> torch.Tensor:
        """Float32 [m, width]; NaN where a row was not computed."""
        rows = [part for _, part in self.parts]  # in order, none twice
        if self.spoiled or not rows or sum(map(len, rows)) < len(self.spec.targets):
            return torch.full(self.spec.result_shape, float("nan"))
        if self.buffer is not None:
            return self.buffer
        return rows[0] if len(rows) == 1 else torch.cat(rows)


@dataclass
class ScheduledRows:
    """One request's share of a step.

    Attributes:
        begin: prompt positions computed before the step.
        num_tokens: computed in it.
        first_index: of the request's first hidden state in the step.
    """

    request_id: str
    scores: RequestScores
    begin: int
    num_tokens: int
    first_index: int

    @property
    def complete(self) -> bool:
        """Whether the prompt is computed with this step."""
        return self.begin + self.num_tokens >= self.scores.spec.end

    @property
    def rows(self) -> tuple[int, int]:
        """The scored rows ``[low, high)`` of the step; ``low >= high`` when there are none."""
        spec = self.scores.spec
        return max(self.begin, spec.start), min(self.begin + self.num_tokens, spec.end)

    @property
    def index(self) -> np.ndarray:
        """[c], the places in the step of the hidden states of `rows`."""
        low, high = self.rows
        return np.arange(low, high) + self.first_index - self.begin

    @property
    def targets(self) -> np.ndarray:
        """int32 [c, k]."""
        (low, high), spec = self.rows, self.scores.spec
        return spec.targets[low - spec.start : high - spec.start]


def score_step(
    scheduled: Iterable[ScheduledRows], hidden: torch.Tensor, compute_logits: ComputeLogits
) -> dict[str, torch.Tensor]:
    """Score one step.

    Args:
        scheduled: the score requests of the step.
        hidden: [T, H], the step's hidden states.
        compute_logits: the model's head.

    Returns:
        The results float32 [m, width] of the requests that are complete, on the host. On a GPU
        they are valid once the stream has caught up.
    """
    groups: dict[RowLayout, list[ScheduledRows]] = {}
    # In the order of their hidden states, so that rows that follow each other need no copy.
    scheduled = sorted(scheduled, key=lambda s: s.first_index)
    for s in scheduled:
        low, high = s.rows
        if low < high:
            groups.setdefault(s.scores.spec.layout, []).append(s)
    for layout, members in groups.items():
        if layout.top == FULL_VOCABULARY:
            for member in members:
                _score_whole_vocabulary(member, hidden, compute_logits)
        else:
            _score_group(members, hidden, compute_logits)
    return _to_host({s.request_id: s.scores.assemble() for s in scheduled if s.complete})


def _score_group(
    members: list[ScheduledRows], hidden: torch.Tensor, compute_logits: ComputeLogits
) -> None:
    """Requests with the same layout, together; their results stay on the device."""
    index = np.concatenate([s.index for s in members])
    targets = np.concatenate([s.targets for s in members])
    scored = _score_blocks(members[0].scores.spec, index, targets, hidden, compute_logits)
    blocks = [block for _, block in scored]
    results = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    parts = results.split([len(s.targets) for s in members])
    for s, part in zip(members, parts, strict=True):
        s.scores.add(s.rows[0], part)


def _score_whole_vocabulary(
    member: ScheduledRows, hidden: torch.Tensor, compute_logits: ComputeLogits
) -> None:
    """One request, whose results go to the host block by block."""
    scores, (low, high) = member.scores, member.rows
    out = scores.host_rows(low, high)
    # The first target of each row is the one whose rank the statistic `rank` tells.
    first_targets = member.targets[:, :1]
    blocks = _score_blocks(scores.spec, member.index, first_targets, hidden, compute_logits)
    writer = HostWriter()
    for rows, scored in blocks:
        writer.write(out[rows], scored)
    writer.finish()
    scores.add(low, out)


def _score_blocks(
    spec: ScoreSpec,
    index: np.ndarray,
    targets: np.ndarray,
    hidden: torch.Tensor,
    compute_logits: ComputeLogits,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the results of the hidden states `index`, [c, width], a block of rows at a time."""
    layout, vocab_size = spec.layout, spec.vocab_size
    first_index, last_index = int(index[0]), int(index[-1])
    consecutive = last_index - first_index + 1 == len(index)
    copied_bytes = 0 if consecutive else hidden.element_size() * hidden.shape[1]
    device_targets = to_device(targets.astype(np.int64), hidden.device)
    block = block_rows(False, layout, vocab_size, copied_bytes)
    first = 0
    while first < len(index):
        rows = slice(first, min(first + block, len(index)))
        if consecutive:
            part = hidden[first_index + rows.start : first_index + rows.stop]
        else:
            part = hidden.index_select(0, to_device(index[rows], hidden.device))
        head, taken = head_of(compute_logits, part, index[rows], vocab_size)
        block = block_rows(head.needs_logits, layout, vocab_size, copied_bytes)
        if len(part) > block:
            continue  # the first block, of a head that needs logits: again with fewer rows
        yield rows, score_rows(head, taken, device_targets[rows], layout, vocab_size)
        first = rows.stop


def _to_host(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that lie on a device as views of one pinned array, in one copy, not waited for."""
    away = {name: result for name, result in results.items() if result.device.type != "cpu"}
    if not away:
        return results
    flat = torch.cat([result.flatten() for result in away.values()])
    host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
    host.copy_(flat, non_blocking=True)
    parts = host.split([result.numel() for result in away.values()])
    return results | {
        name: part.view(away[name].shape) for name, part in zip(away, parts, strict=True)
    }


class HostWriter:
    """Writes blocks of a device's results into pageable memory, one behind the computation.

    A block is copied to one of two pinned buffers while the device computes the next one, and from
    there by the host.
    """

    def __init__(self) -> None:
        self._pinned: list[torch.Tensor | None] = [None, None]
        self._waiting: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event] | None = None
        self._turn = 0

    def write(self, out: torch.Tensor, block: torch.Tensor) -> None:
        """Copy `block` to `out`, of the same shape; `out` is complete after `finish()`."""
        if block.device.type != "cuda":
            out.copy_(block)
            return
        pinned = self._pinned[self._turn]
        if pinned is None or len(pinned) < len(block):
            pinned = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
            self._pinned[self._turn] = pinned
        staged = pinned[: len(block)].copy_(block, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record()
        self.finish()
        self._waiting = (out, staged, copied)
        self._turn = 1 - self._turn

    def finish(self) -> None:
        """Wait for the last block."""
        if self._waiting is not None:
            out, staged, copied = self._waiting
            copied.synchronize()
            out.copy_(staged)
            self._waiting = None


def empty_kv_cache(engine_core: Any) -> bool:
    """Forget all cached prefixes and write zeros over all blocks; False where some are in use.

    NaN that a request left in the KV cache spoils later ones: attention that reads whole blocks
    weighs what lies behind a prompt with 0, and 0 times NaN is NaN. Called in the engine core
    between its steps, so that no request can be given a block meanwhile.
    """
    if not engine_core.reset_prefix_cache():
        return False
    engine_core.collective_rpc(_write_zeros)
    return True


def _write_zeros(worker: Any) -> None:
    """Called in each worker."""
    for tensor in tree_leaves(worker.model_runner.kv_caches):
        tensor.zero_()
