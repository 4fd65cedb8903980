"""Ordinary generation is bit-identical with and without us.

Token ids and log-probabilities of stock vLLM and of the amended one are compared for equality: for
generation alone, and for a batch that mixes generation with score requests. There the stock batch
holds, in the place of each score request, an ordinary request for one token of the same prompt
less its last token, which is what the engine computes for a score request: rows of a product are
added up in another order when the batch has another shape, with or without us.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.patches.processes import run_script

# Requests of all kinds; VLLM_SCORE_TEST_REQUESTS=2000 before a release.
MANY = int(os.environ.get("VLLM_SCORE_TEST_REQUESTS", "120"))

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def found(pool: ThreadPoolExecutor, model_dir: Callable[..., Path]) -> tuple[Any, Any]:
    """What stock vLLM and what the amended one generated."""
    model = model_dir("llama")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    stock, ours = (
        pool.submit(run_script, "generation.py", model, side, MANY, **environment, **plugins)
        for side, plugins in (("without us", {"VLLM_PLUGINS": ""}), ("with us", {}))
    )
    return stock.result(), ours.result()


def test_the_two_really_differ(found: tuple[Any, Any]) -> None:
    stock, ours = found
    assert stock["score"][0] == "ScoreModeUnavailable"
    assert "VLLM_PLUGINS" in stock["score"][1]
    assert ours["score"][0] == "scores"


@pytest.mark.parametrize("batch", ["alone", "mixed", "mixed, chunked", "after scoring"])
def test_generation_is_bit_identical(batch: str, found: tuple[Any, Any]) -> None:
    stock, ours = (side[batch] for side in found)
    assert len(stock) == 6
    for request in stock:
        assert len(request["token_ids"]) == len(request["logprobs"]) == 12
    assert ours == stock


def test_requests_of_all_kinds_are_bit_identical(found: tuple[Any, Any]) -> None:
    stock, ours = found
    assert len(stock["many"]) == MANY
    assert ours["many"] == stock["many"]
