"""One rank's part of a language-model head, as the scoring operators need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Head:
    """The logits ``scale * cap(hidden @ weight.T + bias)`` of a contiguous range of token ids.

    Attributes:
        weight: [n, H] plain weights; None where only `logits_of` knows them (quantised, adapted).
        bias: [n] or None.
        logits_of: hidden states [c, H] to raw logits [c, at least n] of this range.
        first_id: id of the first row.
        num_ids: n, vocabulary padding left out; may be 0 on the last rank.
        scale, soft_cap: of the model; a soft cap of 0 means none.
        gather: all-gathers [c, ...] of every rank to [P, c, ...]; None when this rank has all ids.
        delta: what adapters add to the raw logits of these rows, [c, H] to float32 [c, n]; None
            where they add nothing.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    logits_of: Callable[[torch.Tensor], torch.Tensor]
    first_id: int
    num_ids: int
    scale: float = 1.0
    soft_cap: float = 0.0
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    delta: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def needs_logits(self) -> bool:
        """Whether the rows' logits have to be held: the weights alone do not give them."""
        return self.weight is None or self.delta is not None
