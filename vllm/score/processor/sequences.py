"""Prompts with their responses as token ids: where a response ends, padding, batches of rows.

A response ends at the answer's closing tag, or at an end-of-sequence token.

B prompts, G responses per prompt, L tokens of the longest padded sequence, T generated tokens of
one response.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm.score.checks import Count, Whole, check, check_list
from vllm.score.errors import ScoreModeError
from vllm.score.tokens import encode_inputs, read_token_ids

TAG = "</answer>"
# Tokens of the tail that is looked through at every step: more than the tag's nine characters can
# take, with room for tokens without text among them.
TAIL = 32


@dataclass
class BatchedSequences:
    """Prompts with their responses.

    The prompts are padded on the left to one length P, so that every response begins at column P:
    the token at column i is scored by the logits at i - 1, for i in [P, P + gen_lens[b][g]).

    Attributes:
        sequences: int64 [B, G, L], padding, prompt, response, padding.
        prompt_lens: [B], P each time.
        gen_lens: [B][G] generated tokens, T, the end-of-sequence token included where it was
            generated.
        attention_masks: int64 [B, G, L]: 1 for prompt and response, 0 for padding.
        responses_text: [B][G], special tokens left out.
    """

    sequences: Tensor
    prompt_lens: list[int]
    gen_lens: list[list[int]]
    attention_masks: Tensor
    responses_text: list[list[str]]


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

    def __str__(self) -> str:
        return f"response [{self.prompt}][{self.number}]"


@dataclass(frozen=True)
class RowBatch:
    """Sequences without their last token (nothing is scored after it), padded on the right.

    Attributes:
        responses: [b].
        input_ids: int64 [b, L].
        attention_mask: int64 [b, L].
        rows: int64 [N], N the generated tokens: places in the flattened [b * L].
        tokens: int64 [N], what the rows score.
    """

    responses: Sequence[Response]
    input_ids: Tensor
    attention_mask: Tensor
    rows: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, responses: Sequence[Response], device: torch.device | str) -> RowBatch:
        """The batch of responses of at least one token each."""
        ids, mask = padded([r.ids[:-1] for r in responses], 0, "right", device)
        width = ids.shape[1]
        # From that of the prompt's last token on.
        places = [
            torch.arange(r.prompt_length - 1, len(r.ids) - 1) + i * width
            for i, r in enumerate(responses)
        ]
        tokens = torch.cat([r.generated for r in responses])
        return cls(responses, ids, mask, torch.cat(places).to(device), tokens.to(device))

    @property
    def lengths(self) -> list[int]:
        """[b] rows of each response."""
        return [r.length for r in self.responses]


def row_batches(
    responses: Sequence[Response], batch_size: int, device: torch.device | str
) -> Iterator[tuple[list[int], RowBatch]]:
    """Batches of sequences of like length, the longest first, with the places of their responses;
    empty responses are in none.
    """
    places = [i for i, r in enumerate(responses) if r.length]
    places.sort(key=lambda i: -len(responses[i].ids))
    for first in range(0, len(places), batch_size):
        part = places[first : first + batch_size]
        yield part, RowBatch.of([responses[i] for i in part], device)


def prompt_ids(prompts: Any, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of prompts; texts get the tokenizer's special tokens, once.

    Args:
        prompts: texts, or lists of token ids.
        vocab_size: of the model.

    Raises:
        ScoreModeError: no prompts, one without a token, or neither texts nor ids.
    """
    check_list("prompts", prompts, Iterable)
    listed = list(prompts)
    if not listed:
        raise ScoreModeError("prompts is empty; give at least one text, or list of token ids.")
    names = [f"prompts[{i}]" for i in range(len(listed))]
    found = [tokens.ids for tokens in encode_inputs(tokenizer, listed, names, vocab_size)]
    for name, ids in zip(names, found, strict=True):
        if not ids:
            raise ScoreModeError(
                f"{name} has no token: the first generated token would have no context; "
                "give at least one, such as the beginning-of-sequence token."
            )
    return found


def pad_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_token_id: int,
    decode: Callable[[list[int]], str],
    device: torch.device | str = "cpu",
) -> BatchedSequences:
    """The ids [B][n] of prompts and [B][G][T] of their responses as a padded batch on `device`."""
    each = len(responses[0])
    fronts = padded(prompts, pad_token_id, "left", device)
    ends = padded([r for group in responses for r in group], pad_token_id, "right", device)
    ids, mask = (
        torch.cat([front.repeat_interleave(each, 0), end], 1).unflatten(0, (-1, each))
        for front, end in zip(fronts, ends, strict=True)
    )
    return BatchedSequences(
        sequences=ids,
        prompt_lens=[fronts[0].shape[1]] * len(prompts),
        gen_lens=[[len(r) for r in group] for group in responses],
        attention_masks=mask,
        responses_text=[[decode(list(r)) for r in group] for group in responses],
    )


def padded(
    rows: Sequence[Any], value: int, side: str, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Rows of ids padded with `value` on a side, and their mask: int64 [R, L] each."""
    ids = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
    fill = partial(pad_sequence, batch_first=True, padding_side=side)
    mask = fill([torch.ones_like(row) for row in ids])
    return fill(ids, padding_value=value).to(device), mask.to(device)


def check_fit(responses: Sequence[Response], vocab_size: int, longest: int, remedy: str) -> None:
    """Raise ScoreModeError for a token beyond the vocabulary, or a sequence that is too long.

    Args:
        longest: tokens of a prompt with its response.
        remedy: for one that is longer.
    """
    for response in responses:
        size = len(read_token_ids(response.ids, vocab_size, str(response)))
        if size > longest:
            raise ScoreModeError(
                f"{response} has {size} tokens with its prompt; the model takes {longest}: "
                f"{remedy}."
            )


def responses_of(batch: BatchedSequences) -> list[Response]:
    """Every response of a batch, in the order of b, then g.

    Raises:
        ScoreModeError: the fields contradict each other, or a prompt has no token.
    """
    if not isinstance(batch, BatchedSequences):
        raise ScoreModeError(
            f"sequences must be BatchedSequences, as generate_batched makes them, got "
            f"{type(batch).__name__}."
        )
    ids, masks = batch.sequences, batch.attention_masks
    are_ids = isinstance(ids, Tensor) and ids.dtype in (torch.int32, torch.int64)
    is_grid = are_ids and ids.dim() == 3 and all(ids.shape[:2])
    if not is_grid or not isinstance(masks, Tensor) or masks.shape != ids.shape:
        raise ScoreModeError(
            "sequences must be a tensor of int64 token ids [B, G, L] with at least one prompt and "
            "one response, and attention_masks a tensor of 0 and 1 of the same shape, got "
            f"{_described(ids)} and {_described(masks)}."
        )
    prompts, responses, _ = ids.shape
    per_prompt: list[int] = check("prompt_lens", _plain(batch.prompt_lens), list[Count])
    gen_lens: list[list[int]] = check("gen_lens", _plain(batch.gen_lens), list[list[Whole]])
    widths = [len(lengths) for lengths in gen_lens]
    one_length = len(per_prompt) == prompts and len(set(per_prompt)) == 1
    if not one_length or widths != [responses] * prompts:
        raise ScoreModeError(
            f"prompt_lens must be {prompts} times the one length that the prompts are padded to "
            f"on the left, and gen_lens {responses} lengths for each of these prompts, got "
            f"{per_prompt} and {widths} lengths."
        )
    ids, masks = ids.cpu(), masks.cpu().bool()
    begin, found = per_prompt[0], []
    for b, lengths in enumerate(gen_lens):
        for g, length in enumerate(lengths):
            mask, end = masks[b, g], begin + length
            first = begin - int(mask[:begin].sum())
            filled = first < begin and end <= len(mask) and bool(mask[first:end].all())
            if not filled or int(mask.sum()) != end - first:
                raise ScoreModeError(
                    f"gen_lens[{b}][{g}] is {length}, and attention_masks[{b}, {g}] does not fit: "
                    f"a prompt of at least one token, padded on the left, ends at column {begin}, "
                    "and exactly the generated tokens follow."
                )
            found.append(Response(b, g, ids[b, g, first:end], length))
    return found


def _described(given: Any) -> str:
    is_tensor = isinstance(given, Tensor)
    return f"{given.dtype} {tuple(given.shape)}" if is_tensor else type(given).__name__


def _plain(given: Any) -> Any:
    """Tensors as lists and numbers, within lists too."""
    if isinstance(given, Tensor):
        return given.tolist()
    return [_plain(each) for each in given] if isinstance(given, list | tuple) else given


def eos_token_ids(tokenizer: Any, of_model: Any) -> list[int]:
    """All ids that end a sequence, the tokenizer's (if it names one) first.

    Args:
        of_model: `eos_token_id` of the model's generation_config: None, one or several.
    """
    more = [of_model] if isinstance(of_model, Integral) else of_model or []
    listed = [tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(int(token) for token in listed if token is not None))


def after_answer(input_ids: Tensor, scores: Any, *, prompt_length: int, tokenizer: Any) -> Tensor:
    """Whether each row's response contains the tag, bool [R]: a stopping criterion of transformers.

    The text decides, not the tokens: how a tag is split depends on what stands around it. A tag in
    the prompt, or one begun there, does not count.

    Args:
        input_ids: int64 [R, L].
        scores: not used.
        prompt_length: columns of the padded prompts.
        tokenizer: decodes the ids.
    """
    rows = input_ids[:, prompt_length:].tolist()
    ended = [has_tag(row[-TAIL:], tokenizer) and has_tag(row, tokenizer) for row in rows]
    return torch.tensor(ended, device=input_ids.device)


def response_length(ids: Sequence[int], tokenizer: Any, eos_token_ids: Collection[int]) -> int:
    """How many of the generated tokens are the response.

    Up to the token that completes the first tag, or the first end-of-sequence token, itself
    included, whichever comes first; otherwise all. The padding that transformers puts behind a tag
    is no part of it: the policy did not draw it.

    Args:
        ids: generated tokens of one row, with whatever follows the response.
        tokenizer: decodes the ids.
        eos_token_ids: all end-of-sequence tokens.
    """
    end = next((n for n, token in enumerate(ids, start=1) if token in eos_token_ids), len(ids))
    given = list(ids[:end])
    if not has_tag(given, tokenizer):
        return end
    return bisect_left(range(end), True, key=lambda n: has_tag(given[:n], tokenizer))


def has_tag(ids: list[int], tokenizer: Any) -> bool:
    """Whether the text of the ids, special tokens left out, contains the tag."""
    return TAG in tokenizer.decode(ids, skip_special_tokens=True)
