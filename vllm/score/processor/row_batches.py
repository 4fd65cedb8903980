"""Batches of sequences for a forward pass, and the rows of them that score generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from vllm.score.errors import ScoreModeError
from vllm.score.processor.batches import Response
from vllm.score.processor.steps import StepValues


@dataclass(frozen=True)
class RowBatch:
    """Sequences without their last token (nothing is scored after it), padded on the right.

    Attributes:
        places: [b] where in the caller's list each response stands.
        starts: [b] first row of each response, that of its prompt's last token.
        lengths: [b] rows of each response.
        input_ids: int64 [b, L].
        attention_mask: int64 [b, L].
        position_ids: int64 [b, L].
        rows: int64 [N], N the sum of `lengths`: places in the flattened [b * L].
        tokens: int64 [N], what the rows score.
    """

    places: list[int]
    starts: list[int]
    lengths: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls, responses: Sequence[Response], places: list[int], device: torch.device | str
    ) -> RowBatch:
        """The batch of `responses[i]` for i in `places`, each of at least one token."""
        chosen = [responses[i] for i in places]
        width = max(len(r.ids) for r in chosen) - 1
        ids = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        rows = []
        for i, response in enumerate(chosen):
            last = len(response.ids) - 1
            ids[i, :last] = response.ids[:-1]
            mask[i, :last] = 1
            rows.append(torch.arange(last - response.length, last) + i * width)
        return cls(
            places=places,
            starts=[r.prompt_length - 1 for r in chosen],
            lengths=[r.length for r in chosen],
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=torch.arange(width, device=device).expand(len(chosen), width),
            rows=torch.cat(rows).to(device),
            tokens=torch.cat([r.generated for r in chosen]).to(device),
        )


def row_batches(
    responses: Sequence[Response], batch_size: int, device: torch.device | str
) -> Iterator[RowBatch]:
    """Batches of sequences of like length, the longest first; empty responses are in none."""
    places = [i for i, r in enumerate(responses) if r.length]
    places.sort(key=lambda i: -len(responses[i].ids))
    for first in range(0, len(places), batch_size):
        yield RowBatch.of(responses, places[first : first + batch_size], device)


def check_ids(model: nn.Module, responses: Sequence[Response]) -> None:
    """Whether a Hugging Face model has an embedding for every token and position.

    Raises:
        ScoreModeError: names the response.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocab_size = getattr(config, "vocab_size", None)
    positions = getattr(config, "max_position_embeddings", None)
    for response in responses:
        ids = response.ids
        if vocab_size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise ScoreModeError(
                f"{_name(response)} has the token {int(wrong)}; the model's vocabulary is 0 to "
                f"{vocab_size - 1}: was it made by another tokenizer?"
            )
        if positions and len(ids) - 1 > positions:
            raise ScoreModeError(
                f"{_name(response)} is {len(ids)} tokens long with its prompt; the model has "
                f"{positions} positions (max_position_embeddings)."
            )


def values_by_response(
    responses: Sequence[Response],
    batches: Iterable[RowBatch],
    score: Callable[[RowBatch], Sequence[StepValues[Tensor]]],
    empty: Callable[[], StepValues[Tensor]],
) -> list[StepValues[Tensor]]:
    """Values of every response's steps, in the order of `responses`.

    Args:
        score: the values of a batch's rows, in pieces.
        empty: the values of no rows.

    Raises:
        ScoreModeError: a log-probability is NaN, as it is where a row's logits have NaN.
    """
    found: list[StepValues[Tensor] | None] = [None] * len(responses)
    for batch in batches:
        pieces = score(batch)
        # By field: the tensors of all pieces, then one tensor for each response.
        whole = {
            name: torch.cat([getattr(p, name) for p in pieces]) for name in _computed(pieces[0])
        }
        _refuse_nan(whole["logprob"], batch, responses)
        parts = [tensor.split(batch.lengths) for tensor in whole.values()]
        for place, tensors in zip(batch.places, zip(*parts, strict=True), strict=True):
            found[place] = StepValues(**dict(zip(whole, tensors, strict=True)))
    return [empty() if values is None else values for values in found]


def _refuse_nan(logprob: Tensor, batch: RowBatch, responses: Sequence[Response]) -> None:
    bad = logprob.isnan()
    if not bool(bad.any()):
        return
    for place, part in zip(batch.places, bad.split(batch.lengths), strict=True):
        if bool(part.any()):
            step = int(part.nonzero()[0])
            raise ScoreModeError(
                f"the logits of {_name(responses[place])} at step {step} have NaN or +inf: check "
                "the parameters (and eta), or compute in a wider dtype."
            )


def _computed(values: StepValues[Tensor]) -> list[str]:
    return [f.name for f in fields(values) if getattr(values, f.name) is not None]


def _name(response: Response) -> str:
    return f"response [{response.prompt}][{response.number}]"
