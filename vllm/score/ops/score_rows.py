"""Hidden states to scores, in row chunks whose logits never exceed a fixed amount of memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from vllm.score.engine.layout import RowLayout
from vllm.score.ops.reference import reduce_logits

logger = logging.getLogger(__name__)

# Logits in the model's dtype and one float32 copy of them; the rest of the budget is the
# reduction's own temporaries.
LOGITS_BUDGET_BYTES = 96 << 20
MAX_CHUNK_ROWS = 1024


def chunk_rows(vocab_size: int, width: int) -> int:
    """Rows scored at once, so that the extra memory stays under 256 MiB.

    Args:
        vocab_size: logits a row.
        width: results a row; those of the chunk before may still be held.
    """
    a_row = 4 * (vocab_size + 2 * width)
    return max(1, min(MAX_CHUNK_ROWS, LOGITS_BUDGET_BYTES // a_row))


def score_chunks(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    index: torch.Tensor,
    targets: torch.Tensor,
    layout: RowLayout,
    vocab_size: int,
) -> Iterator[torch.Tensor]:
    """Score rows of hidden states, a chunk at a time.

    Args:
        logits_of: the model's head, hidden states [c, H] to logits [c, V]; every rank of a
            tensor-parallel group gets all of V.
        hidden: [T, H].
        index: int64 [R], the rows of `hidden` to score.
        targets: int64 [R, k] on the device of `hidden`.
        layout: what to compute.
        vocab_size: V.

    Yields:
        float32 [c, layout.width(V)], the chunks of the R rows in order.
        A head that does not give V logits a row yields NaN, which the front end reports.
    """
    chunk = chunk_rows(vocab_size, layout.width(vocab_size))
    for first in range(0, index.shape[0], chunk):
        rows = slice(first, first + chunk)
        logits = logits_of(hidden.index_select(0, index[rows]))
        if logits.shape[-1] != vocab_size:
            # An exception here would take the engine and everybody's requests down; NaN fails
            # just these requests, with an error, at the front end.
            logger.error(
                "The model's head gives %d logits a row, its configuration says %d: no scores.",
                logits.shape[-1],
                vocab_size,
            )
            yield logits.new_full(
                (logits.shape[0], layout.width(vocab_size)), float("nan"), dtype=torch.float32
            )
            continue
        yield reduce_logits(logits, targets[rows], layout)
