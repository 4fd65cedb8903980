"""One real run, and what it should have found, computed by Hugging Face in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import token_logprobs

CONTEXT, STRIDE = 256, 64
# Markup, mathematics, line ends, tabs, a character of several tokens: all that a report must show.
TEXT = "<b>Träume & Schäume</b> cost $5^2 \\alpha$ or 漢字 😀.\n\tNobody ever\r\nsaid so. " * 24


@dataclass(frozen=True)
class Expected:
    """Of the scored tokens in their order. positions: int64 [n]; losses: float64 [n], nats."""

    token_ids: list[int]
    positions: np.ndarray
    losses: np.ndarray

    @property
    def perplexity(self) -> float:
        return math.exp(self.losses.mean())


def sliding_losses(
    log_softmax: Callable[[list[int]], np.ndarray], ids: list[int], context: int, stride: int
) -> np.ndarray:
    """Losses of ids[1:], each scored once, in the windows of the Hugging Face guide."""
    losses, done = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = ids[begin:end]
        if done < end:
            losses.append(-token_logprobs(log_softmax(window), window)[done - begin - 1 :])
            done = end
        if end == len(ids):
            break
    return np.concatenate(losses)


@pytest.fixture(scope="session")
def expected(model_dir: Callable[..., Path], reference: Callable[..., np.ndarray]) -> Expected:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    ids = tokenizer(TEXT)["input_ids"]
    assert ids[0] != tokenizer.bos_token_id  # else the first token is no part of the text
    losses = sliding_losses(lambda window: reference("llama", window), ids, CONTEXT, STRIDE)
    return Expected(ids[1:], np.arange(1, len(ids)), losses)


@pytest.fixture(scope="session")
def result(llm: Any) -> Any:
    from vllm.score.perplexity import perplexity

    return perplexity(
        llm,
        TEXT,
        context_length=CONTEXT,
        stride=STRIDE,
        conventions=["hf-stride", f"gptq:{CONTEXT}"],
        use_tqdm=False,
    )
