"""Texts longer than the model: our model and lm-eval's `hf` model from the same folder.

The folder's model has learned positions, so that there is none beyond its length, and the window
is the model's whole length: 64 tokens read, and the one after them predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SMALL_CACHE, SMALL_CHUNKS
from tests.helpers import record_pairs, with_bos
from tests.integrations.tasks import SENTENCES
from vllm.score.errors import ScoreModeError

pytestmark = pytest.mark.engine

LENGTH = 64
PAGE = " ".join(SENTENCES * 3)
PLAIN = " ".join(SENTENCES[:5] * 5)  # every character has a token


@pytest.fixture(scope="session")
def folder(model_dir: Callable[..., Path]) -> Path:
    """With a tokenizer that writes a BOS by itself, unless add_bos_token says otherwise."""
    from transformers import AutoTokenizer

    tokenizer = with_bos(AutoTokenizer.from_pretrained(model_dir("llama")))
    return model_dir("gpt2", max_position_embeddings=LENGTH, tokenizer=tokenizer)


@pytest.fixture(scope="session")  # an engine that dies takes the others' groups along
def running(folder: Path) -> Any:
    """Our model as the command starts it."""
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    options = {"dtype": "float32", "max_num_batched_tokens": SMALL_CHUNKS, **SMALL_CACHE}
    return VLLMScoreLM(str(folder), max_num_seqs=8, **options)


def hugging_face(folder: Path, **options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), dtype="float32", device="cpu", batch_size=4, **options)


@pytest.fixture(params=[(None, None), (None, 21), (True, None), (False, 21)], ids=str)
def pair(request: pytest.FixtureRequest, running: Any, folder: Path) -> tuple[Any, Any]:
    """(ours, hf) with the same `add_bos_token` and `max_length`."""
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    add_bos_token, length = request.param
    options = {"add_bos_token": add_bos_token, "max_length": length}
    ours = VLLMScoreLM.from_llm(running.model, **options)
    hf = hugging_face(folder, **options)
    assert ours.max_length == hf.max_length == (length or LENGTH)
    return ours, hf


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def text_of(model: Any, tokens: int) -> str:
    """A text of that many tokens, any BOS that the model puts in front included."""
    ids = model.tok_encode(PLAIN)
    text = model.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
    assert len(model.tok_encode(text)) == tokens
    return text


def test_rolling_windows(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, hf = pair
    n = ours.max_length
    lengths = [n - 1, n, n + 1, 2 * n - 1, 2 * n, 2 * n + 1]
    documents = [PAGE, "", "short", *(text_of(ours, length) for length in lengths)]
    documents += [f"{ours.tokenizer.bos_token}{PAGE}"]
    sent = [record_pairs(model, monkeypatch) for model in pair]
    requests = instances("loglikelihood_rolling", [(document,) for document in documents])
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    assert sent[0] == sent[1]
    assert max(len(context) + len(continuation) for context, continuation in sent[0]) == n + 1
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_truncated_contexts(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, hf = pair
    n = ours.max_length
    words = [" of the list", " elements in the file", " the"]
    pairs = [(context, word) for context in (PAGE, SENTENCES[0]) for word in words]
    for length in (n - 1, n, n + 1, n + 2):  # of both together
        whole = text_of(ours, length)
        pairs += [(whole[: len(whole) // 2], whole[len(whole) // 2 :])]
    longest = ours.tokenizer.decode(ours.tok_encode(PAGE, add_special_tokens=False)[:n])
    pairs += [("", longest), (f"{ours.tokenizer.bos_token}{PAGE}", " of")]
    sent = [record_pairs(model, monkeypatch) for model in pair]
    requests = instances("loglikelihood", pairs)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    assert sent[0] == sent[1]
    assert sum(len(context) + len(continuation) > n + 1 for context, continuation in sent[0]) > 3
    np.testing.assert_allclose([a for a, _ in found], [a for a, _ in expected], rtol=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    with pytest.raises(ScoreModeError, match=rf"{n + 1} tokens, more than .* max_model_len={n}:"):
        ours._loglikelihood_tokens([(None, [1], [1] * (n + 1))])


def test_a_given_engine_that_cannot_read_as_many_is_named(running: Any) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    given = running.model.llm_engine.model_config.max_model_len
    assert given == LENGTH + 1
    remedy = rf"max_length is {given}, .* LLM\(max_model_len={given + 1}\), or give max_length=64"
    with pytest.raises(ScoreModeError, match=remedy):
        VLLMScoreLM.from_llm(running.model, max_length=given)
