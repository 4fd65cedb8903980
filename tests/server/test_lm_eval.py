"""`lm_eval --model local-completions` against the server: the numbers of lm-eval's `hf` backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.server.metrics import finished

PAIRS = [
    ("The reader opens", " the message"),
    ("The reader opens", " a file and returns its first line"),
    ("def parse(self, text):\n    return", " self.parser.parse(text)"),
    ("message", "."),
    ("", "An empty context"),
]
TEXTS = ["The policy of a message decides how its headers are folded.", "def f(x):\n    pass"]


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.fixture(scope="module")
def hf(model_dir: Callable[..., Path]) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(model_dir("llama")), dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(
    scope="module",
    params=[
        {"tokenized_requests": True},
        {"tokenized_requests": True, "num_concurrent": 4},
        {"tokenized_requests": True, "batch_size": 3},
        {"tokenized_requests": False},
    ],
    ids=str,
)
def local(request: Any, server: str, model_dir: Callable[..., Path]) -> Iterator[Any]:
    pytest.importorskip("tenacity", reason="pip install 'lm-eval[api]'")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    yield LocalCompletionsAPI(
        model="model",
        base_url=f"{server}/v1/completions",
        tokenizer=str(model_dir("llama")),
        tokenizer_backend="huggingface",
        **request.param,
    )


def test_loglikelihood(local: Any, hf: Any, client: httpx.Client) -> None:
    before = finished(client)
    found = local.loglikelihood(instances("loglikelihood", PAIRS))
    # Each is scored and then generates the token that lm-eval asks for: not stock's way.
    assert finished(client) - before == 2 * len(PAIRS)
    expected = hf.loglikelihood(instances("loglikelihood", PAIRS))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]


def test_loglikelihood_rolling(local: Any, hf: Any) -> None:
    texts = [(text,) for text in TEXTS]
    found = local.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    expected = hf.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    np.testing.assert_allclose(found, expected, atol=1e-4)
