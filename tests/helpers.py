"""Small functions that several tests share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

# Nats of float32 engines from Hugging Face in float64. A GPU's attention runs in TF32, stock's too.
TOLERANCE = 3e-2 if torch.cuda.is_available() else 2e-5


def token_logprobs(log_softmax: np.ndarray, ids: list[int]) -> np.ndarray:
    """Log-probabilities of ids[1:] from the rows before them."""
    return log_softmax[np.arange(len(ids) - 1), ids[1:]]


def random_prompts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    """Prompts of random ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, n).tolist() for n in lengths]


def with_bos(tokenizer: Any, *, eos: bool = False) -> Any:
    """The tokenizer itself, which from now on puts its BOS in front of a text, as Llama's does,
    and its EOS behind one where that is asked for."""
    from tokenizers.processors import TemplateProcessing

    first, last = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}" if eos else f"{first} $A",
        special_tokens=[(first, tokenizer.bos_token_id), (last, tokenizer.eos_token_id)],
    )
    return tokenizer


def record_pairs(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """(context, continuation) token ids of the requests that a model of lm-eval scores from now
    on."""
    sent: list[tuple[list[int], list[int]]] = []
    scored = model._loglikelihood_tokens

    def record(requests: Any, *args: Any, **kwargs: Any) -> Any:
        sent.extend((list(context), list(continuation)) for _, context, continuation in requests)
        return scored(requests, *args, **kwargs)

    monkeypatch.setattr(model, "_loglikelihood_tokens", record)
    return sent
