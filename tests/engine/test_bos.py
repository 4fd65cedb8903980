"""A text that brings its BOS, on an engine whose tokenizer adds one: scored after one BOS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.helpers import token_logprobs
from tests.perplexity.texts import byte_level_with_bos
from vllm.score import score

pytestmark = pytest.mark.engine

TEXT = "<|bos|>hello there"
OPTIONS = {"vocab_size": 1024, "tokenizer": byte_level_with_bos()}


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any]) -> Any:
    return engine("llama", model_options=OPTIONS)


@pytest.fixture(scope="module")
def expected(reference: Callable[..., np.ndarray]) -> tuple[list[int], np.ndarray]:
    """The ids, and the log-probabilities of all but the first, by Hugging Face in float64."""
    ids = byte_level_with_bos().encode(TEXT, add_special_tokens=False)
    assert ids[0] == 0 and 0 not in ids[1:]
    return ids, token_logprobs(reference("llama", ids, **OPTIONS), ids)


def test_score(llm: Any, expected: tuple[list[int], np.ndarray]) -> None:
    ids, logprobs = expected
    given = [TEXT, {"prompt": TEXT}, TEXT.removeprefix("<|bos|>"), ids]
    found = score(llm, given, use_tqdm=False)
    for scores in found:
        assert scores.token_ids is not None and scores.token_ids.tolist() == ids[1:]
        assert np.abs(scores.logprobs - logprobs).max() < 2e-5
    assert [len(scores.notes) for scores in found] == [1, 1, 0, 0]
    assert "begins with '<|bos|>' itself" in found[0].notes[0]


def test_vllms_own_interface(llm: Any, expected: tuple[list[int], np.ndarray]) -> None:
    from vllm import SamplingParams

    ids, logprobs = expected
    params = SamplingParams(score_mode=True, prompt_logprobs=0)
    (output,) = llm.generate([TEXT], params, use_tqdm=False)
    assert output.prompt_token_ids == ids
    assert np.abs(output.scores.logprobs - logprobs).max() < 2e-5
    assert len(output.scores.notes) == 1
    (generated,) = llm.generate([TEXT], SamplingParams(max_tokens=1), use_tqdm=False)
    assert generated.prompt_token_ids == [0, *ids]  # stock's own


def test_perplexity(llm: Any, expected: tuple[list[int], np.ndarray]) -> None:
    from vllm.score.perplexity import perplexity

    _, logprobs = expected
    result = perplexity(llm, TEXT, context_length=64, stride=32, use_tqdm=False)
    assert result.provenance.scored_tokens == len(logprobs)
    assert result.nll == pytest.approx(-logprobs.mean(), abs=2e-5)


def test_sequence_processor(llm: Any, expected: tuple[list[int], np.ndarray]) -> None:
    from vllm.score.processor import SequenceProcessor

    config = {"generation": {"max_new_tokens": 1, "num_return_sequences": 1}}
    sequences = SequenceProcessor(llm=llm, config=config).generate_batched([TEXT], seed=0)
    length = sequences.prompt_lens[0]
    assert sequences.sequences[0][0][:length].tolist() == expected[0]
