"""What a worker keeps of a score request while its prompt is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vllm.score.ops.row_layout import RowLayout


@dataclass(eq=False)
class RequestScores:
    """One request's growing scores.

    Attributes:
        layout: what is computed for a row.
        targets: int32 [m, k].
        start: first scored row.
        vocab_size: V, as the front end knows it.
        parts: (first row, results [c, width]) of what was computed, in order. They lie on the
            device, and for the whole vocabulary in `buffer`.
        buffer: float32 [m, width] on the host, for the whole vocabulary only: its rows are too many
            to wait on the device.
        spoiled: the model was not computed as it should have been; every score is NaN.
    """

    layout: RowLayout
    targets: np.ndarray
    start: int
    vocab_size: int
    parts: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    buffer: torch.Tensor | None = None
    spoiled: bool = False

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

    @property
    def shape(self) -> tuple[int, int]:
        """(m, width)."""
        return len(self.targets), self.layout.width(self.vocab_size)

    def host_rows(self, low: int, high: int) -> torch.Tensor:
        """The buffer's rows ``[low, high)``, to be written and then added."""
        if self.buffer is None:
            # NumPy asks for huge pages, which saves most of the time of touching a gigabyte.
            self.buffer = torch.from_numpy(np.empty(self.shape, dtype=np.float32))
        return self.buffer[low - self.start : high - self.start]

    def assemble(self) -> torch.Tensor:
        """Float32 [m, width], NaN where no row was computed."""
        nan, whole = float("nan"), self.buffer
        if self.spoiled:
            return torch.full(self.shape, nan)
        if whole is None and len(self.parts) == 1 and self.parts[0][1].shape == self.shape:
            return self.parts[0][1]
        if whole is None:
            device = self.parts[0][1].device if self.parts else torch.device("cpu")
            whole = torch.empty(self.shape, dtype=torch.float32, device=device)
        done = 0
        for first, part in self.parts:
            first -= self.start
            whole[done:first] = nan
            if self.buffer is None:
                whole[first : first + len(part)] = part
            done = first + len(part)
        whole[done:] = nan
        return whole


def layout_of(params: Any) -> RowLayout:
    """The layout that the admitted sampling parameters of a score request describe."""
    full = params._score_top < 0
    return RowLayout(
        num_targets=0 if full else params.prompt_logprob_token_ids.shape[1],
        statistics=tuple(params.score_statistics or ()),
        top=params._score_top,
        temperature=params.score_temperature,
        top_p=params.score_top_p,
    )
