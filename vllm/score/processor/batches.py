"""Between padded batches and plain sequences of token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.types import BatchedSequences


@dataclass(frozen=True)
class Response:
    """One response with its prompt, without padding.

    Attributes:
        prompt: index b.
        number: index g.
        ids: int64 [n + T] on the CPU, prompt and response.
        length: T, generated tokens.
    """

    prompt: int
    number: int
    ids: Tensor
    length: int

    @property
    def prompt_length(self) -> int:
        return len(self.ids) - self.length

    @property
    def generated(self) -> Tensor:
        """int64 [T]."""
        return self.ids[self.prompt_length :]


def pad_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    decode: Callable[[list[int]], str],
    device: torch.device | str = "cpu",
) -> BatchedSequences:
    """The ids [B][n] of prompts and [B][G][T] of their responses as a padded batch on `device`."""
    width = max(len(p) for p in prompts)
    longest = max((len(r) for group in responses for r in group), default=0)
    shape = (len(prompts), len(responses[0]), width + longest)
    sequences = torch.full(shape, pad_token_id, dtype=torch.int64)
    masks = torch.zeros(shape, dtype=torch.int64)
    for b, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        for g, response in enumerate(group):
            ids = [*prompt, *response]
            first = width - len(prompt)
            sequences[b, g, first : first + len(ids)] = torch.tensor(ids, dtype=torch.int64)
            masks[b, g, first : first + len(ids)] = 1
    return BatchedSequences(
        sequences=sequences.to(device),
        prompt_lens=[width] * len(prompts),
        gen_lens=[[len(r) for r in group] for group in responses],
        attention_masks=masks.to(device),
        responses_text=[[decode(list(r)) for r in group] for group in responses],
    )


def responses_of(batch: BatchedSequences) -> list[Response]:
    """Every response of a batch, in the order of b, then g.

    Raises:
        ScoreModeError: the fields contradict each other, or a prompt has no token.
    """
    _check_types(batch)
    _check_shapes(batch)
    sequences, masks = batch.sequences.cpu(), batch.attention_masks.cpu().bool()
    found = []
    for b, lengths in enumerate(batch.gen_lens):
        begin = batch.prompt_lens[b]
        for g, length in enumerate(lengths):
            prompt = masks[b, g, :begin]
            first = begin - int(prompt.sum())
            _check_row(masks[b, g], first, begin, length, f"[{b}, {g}]")
            found.append(Response(b, g, sequences[b, g, first : begin + length], length))
    return found


def _check_types(batch: BatchedSequences) -> None:
    if not isinstance(batch, BatchedSequences):
        raise ScoreModeError(
            f"sequences must be BatchedSequences, as generate_batched makes them, got "
            f"{type(batch).__name__}."
        )
    ids = batch.sequences
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ScoreModeError(f"sequences must be a tensor of int64 token ids, got {kind}.")
    if not isinstance(batch.attention_masks, Tensor):
        kind = type(batch.attention_masks).__name__
        raise ScoreModeError(f"attention_masks must be a tensor of 0 and 1, got {kind}.")
    _check_lengths("prompt_lens", batch.prompt_lens, 1)
    _check_lengths("gen_lens", batch.gen_lens, 2)


def _check_lengths(field: str, given: Any, depth: int) -> None:
    if depth:
        if not isinstance(given, (Sequence, Tensor)) or isinstance(given, str):
            raise ScoreModeError(f"{field} must be a list of numbers of tokens, got {given!r:.60}.")
        for i, item in enumerate(given):
            _check_lengths(f"{field}[{i}]", item, depth - 1)
        return
    number = given.item() if isinstance(given, Tensor) else given
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise ScoreModeError(f"{field} must be a number of tokens, got {given!r:.60}.")


def _check_shapes(batch: BatchedSequences) -> None:
    shape = tuple(batch.sequences.shape)
    if len(shape) != 3 or not all(shape[:2]):
        raise ScoreModeError(
            f"sequences must be [B, G, L] with at least one prompt and one response, got {shape}."
        )
    if tuple(batch.attention_masks.shape) != shape:
        raise ScoreModeError(
            f"attention_masks has the shape {tuple(batch.attention_masks.shape)}, sequences "
            f"{shape}: give one entry a token."
        )
    if len(batch.prompt_lens) != shape[0]:
        raise ScoreModeError(
            f"prompt_lens has {len(batch.prompt_lens)} entries for {shape[0]} prompts."
        )
    widths = [len(lengths) for lengths in batch.gen_lens]
    if widths != [shape[1]] * shape[0]:
        raise ScoreModeError(
            f"gen_lens is ragged or of another size: {widths} lengths a prompt for sequences of "
            f"the shape {shape}; give G = {shape[1]} for each of the {shape[0]} prompts."
        )
    if len(set(batch.prompt_lens)) > 1:
        raise ScoreModeError(
            f"prompt_lens is ragged: {sorted(set(batch.prompt_lens))}; pad the prompts of a batch "
            "on the left to one length."
        )
    for b, lengths in enumerate(batch.gen_lens):
        for g, length in enumerate(lengths):
            if not 0 <= length <= shape[2] - batch.prompt_lens[b]:
                raise ScoreModeError(
                    f"gen_lens[{b}][{g}] is {length}: {shape[2]} columns less a prompt of "
                    f"{batch.prompt_lens[b]} hold 0 to {shape[2] - batch.prompt_lens[b]} tokens."
                )


def _check_row(mask: Tensor, first: int, begin: int, length: int, where: str) -> None:
    if first == begin:
        raise ScoreModeError(
            f"the prompt of attention_masks{where} is empty: its first token would have no context."
        )
    expected = torch.zeros_like(mask)
    expected[first : begin + length] = True
    if not torch.equal(mask, expected):
        raise ScoreModeError(
            f"attention_masks{where} does not fit: prompts are padded on the left, and exactly the "
            f"{length} generated tokens from column {begin} on follow."
        )
