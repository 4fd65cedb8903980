"""Sampling responses with Hugging Face's `generate`, by temperature and top-p and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList

from vllm.score.engine.request import read_token_ids
from vllm.score.errors import ScoreModeError
from vllm.score.processor.checks import positive
from vllm.score.processor.head import causal_model, evaluating
from vllm.score.processor.stop import StopAfterAnswer, response_length
from vllm.score.processor.types import GenerationConfig
from vllm.score.tokens import encode_texts

Prompts = Sequence[str] | Sequence[Sequence[int]]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Prompts,
    G: int,
    config: GenerationConfig,
    *,
    batch_size: int,
    seed: int | None = None,
) -> list[list[list[int]]]:
    """G responses to each of B prompts.

    What the model's own generation_config says (top-k, penalties, suppressed tokens and so on) is
    left out, but for its end-of-sequence tokens: the policy is temperature and top-p, so that log q
    is what was sampled from.

    Args:
        model: a causal language model of transformers, also within PEFT or DDP. It generates in
            eval mode, without gradients, and is then as it was.
        tokenizer: the model's.
        prompts: texts, or token ids.
        G: responses a prompt.
        config: temperature, top_p, max_new_tokens, do_sample.
        batch_size: sequences generated at once.
        seed: of the sampling; None takes PyTorch's random numbers as they come.

    Returns:
        [B][G] lists of token ids, cut by `response_length`.

    Raises:
        ScoreModeError: prompts that cannot be used or are too long, G below 1, no
            end-of-sequence token.
    """
    positive("G", G)
    positive("batch_size", batch_size)
    model = unwrap_ddp(model)
    ids = prompt_ids(prompts, tokenizer, vocabulary_size(model))
    _check_lengths(ids, model, config.max_new_tokens)
    ends = eos_token_ids(model, tokenizer)
    if not ends:
        raise ScoreModeError(
            "neither the tokenizer nor the model's generation_config names an end-of-sequence "
            "token; set tokenizer.eos_token."
        )
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = _fresh_config(config, ends, pad)
    rows = [prompt for prompt in ids for _ in range(G)]
    found: list[list[int]] = []
    with torch.no_grad(), evaluating(model), _own_settings_aside(model), _seeded(model, seed):
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            sequences, mask = _left_padded(part, pad)
            width = sequences.shape[1]
            output = model.generate(
                input_ids=sequences.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=sampling,
                logits_processor=LogitsProcessorList([StopAfterAnswer(width, tokenizer, ends[0])]),
            )
            found += output[:, width:].tolist()
    cut = [row[: response_length(row, tokenizer, ends)] for row in found]
    return [cut[first : first + G] for first in range(0, len(cut), G)]


def prompt_ids(prompts: Prompts, tokenizer: Any, vocab_size: int) -> list[list[int]]:
    """The token ids of prompts; texts get the tokenizer's special tokens, once.

    Args:
        vocab_size: of the model.

    Raises:
        ScoreModeError: no prompts, one without a token, or neither texts nor ids.
    """
    whole = isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable)
    listed: list[Any] = [] if whole else list(prompts)
    if not listed:
        raise ScoreModeError(
            "prompts must be a list of at least one text, or list of token ids, got "
            f"{prompts!r:.80}."
        )
    found = []
    texts = {f"prompts[{i}]": p for i, p in enumerate(listed) if isinstance(p, str)}
    encoded = iter(encode_texts(tokenizer, list(texts.values()), list(texts)))
    for number, prompt in enumerate(listed):
        ids: Any = next(encoded).ids if isinstance(prompt, str) else prompt
        found.append(read_token_ids(ids, vocab_size, f"prompts[{number}]").tolist())
        if not found[-1]:
            raise ScoreModeError(
                f"prompts[{number}] has no token: the first generated token would have no context; "
                "give at least one, such as the beginning-of-sequence token."
            )
    return found


def vocabulary_size(model: Any) -> int:
    """Rows of the model's embedding; no limit where it has none."""
    weight = getattr(unwrap_ddp(model).get_input_embeddings(), "weight", None)
    return 1 << 31 if weight is None else len(weight)


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end-of-sequence token, then the others of the model's generation_config.

    Args:
        model: may be None, or a model without generation_config.
        tokenizer: may name none.
    """
    settings = getattr(unwrap_ddp(model), "generation_config", None)
    more = getattr(settings, "eos_token_id", None)
    listed = [tokenizer.eos_token_id, *([more] if isinstance(more, Integral) else more or [])]
    return list(dict.fromkeys(int(token) for token in listed if token is not None))


def unwrap_ddp(model: Any) -> Any:
    """The model within `DistributedDataParallel` or `DataParallel`; PEFT's wrappers stay."""
    while isinstance(model, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        model = model.module
    return model


def _check_lengths(ids: list[list[int]], model: Any, new: int) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for number, prompt in enumerate(ids):
        if limit is not None and len(prompt) + new > limit:
            raise ScoreModeError(
                f"prompts[{number}] has {len(prompt)} tokens: with max_new_tokens {new} that is "
                f"more than the model's {limit} positions; shorten the prompt or lower "
                "max_new_tokens."
            )
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ScoreModeError(
                f"prompts[{number}] has ids from {min(prompt)} to {max(prompt)}; the model's "
                f"vocabulary has 0 to {config.vocab_size - 1}."
            )


def _fresh_config(
    config: GenerationConfig, ends: list[int], pad: int
) -> transformers.GenerationConfig:
    # Sampling fields beside do_sample=False make transformers warn.
    sampling: dict[str, Any] = {"do_sample": False}
    if config.do_sample:
        sampling = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": 0,  # transformers' own default is 50
        }
    return transformers.GenerationConfig(
        max_new_tokens=config.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling
    )


def _left_padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    sequences = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return sequences, mask


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Put an empty generation_config in place of the model's.

    `generate` fills what it is not given from there, and None counts as not given: there is no
    saying "no suppressed tokens" otherwise.
    """
    base: Any = causal_model(model)
    own = base.generation_config
    base.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _seeded(model: Any, seed: int | None) -> Any:
    return nullcontext() if seed is None else _random_numbers(model, seed)


@contextmanager
def _random_numbers(model: Any, seed: int) -> Iterator[None]:
    """Random numbers of a seed; afterwards the caller's go on as if nothing had been drawn."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
