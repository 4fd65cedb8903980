"""The conventions that are named after lm-eval, against lm-eval's own models on the same weights.

The windows have to be the tool's to the token; the log-probabilities are float32 of two programs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.helpers import record_pairs, with_bos
from tests.integrations.tasks import ROLLING, SENTENCES
from vllm.score.data import as_source
from vllm.score.perplexity import Job, PerplexityResult, Settings, prepare
from vllm.score.perplexity.conventions import LM_EVAL_HF, LM_EVAL_VLLM
from vllm.score.perplexity.run import engine_scorer, score_job

pytestmark = pytest.mark.engine

LENGTH = 64
PAGE = " ".join(SENTENCES * 4)
DOCUMENTS = [PAGE, "", "short", "a", f"<|bos|>{PAGE[:500]}", "\n\n ", *SENTENCES]
TOKENIZERS = {
    "adds nothing": None,
    "adds a BOS": ("bos",),
    "adds a BOS and an EOS": ("bos", "eos"),
}
IDENTITY: dict[str, Any] = {
    "model": {"name": "tiny", "weights_sha256": "0" * 64},
    "engine": {"dtype": "float32", "quantization": "none"},
    "versions": {},
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest, model_dir: Callable[..., Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    added = TOKENIZERS[request.param]
    return tokenizer if added is None else with_bos(tokenizer, eos="eos" in added)


@pytest.fixture(params=[LM_EVAL_HF, LM_EVAL_VLLM])
def tool(
    request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Any]:
    """(name of the convention, lm-eval's model), which reads at most `LENGTH` tokens."""
    if request.param == LM_EVAL_HF:
        # Its cache takes two windows of one batch for each other that have the same tokens and
        # begin to predict at different ones, as texts with repetitions have them.
        model = request.getfixturevalue("make_hf")(max_length=LENGTH, logits_cache=False)
    else:
        model = request.getfixturevalue("stock_vllm")
        monkeypatch.setattr(model, "_max_length", LENGTH)
    monkeypatch.setattr(model, "tokenizer", tokenizer)
    assert model.max_length == LENGTH
    return request.param, model


def the_job(tokenizer: Any, documents: list[str], *names: str) -> Job:
    settings = Settings(
        context_length=LENGTH, stride=LENGTH // 2, conventions=names, group_tokens=4096
    )
    return prepare(settings, as_source(documents), tokenizer)


def the_run(llm: Any, tokenizer: Any, documents: list[str], *names: str) -> PerplexityResult:
    job = the_job(tokenizer, documents, *names)
    return score_job(job, engine_scorer(llm), IDENTITY, use_tqdm=False)


def windows(job: Job) -> Iterator[tuple[list[int], list[int]]]:
    """(context, targets) of the windows of the convention."""
    plan = job.conventions[0].plan
    for window in job.stream(plan).windows(plan):
        yield window.token_ids[: -window.num_targets], window.target_ids


def test_windows_and_log_likelihoods_are_the_tool_s(
    llm: Any, tool: tuple[str, Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    name, model = tool
    sent = record_pairs(model, monkeypatch)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=0)
        for document in DOCUMENTS
    ]
    loglikelihoods = model.loglikelihood_rolling(requests, disable_tqdm=True)

    assert list(windows(the_job(tokenizer, DOCUMENTS, name))) == sent
    loss = the_run(llm, tokenizer, DOCUMENTS, name).figure("nll", name)
    targets = sum(len(targets) for _, targets in sent)
    assert loss.provenance.scored_tokens == targets
    assert -loss.value * targets == pytest.approx(sum(loglikelihoods), rel=1e-6)


def test_metrics_are_the_tool_s(
    llm: Any, tool: tuple[str, Any], tokenizer: Any, evaluate: Callable[..., Any]
) -> None:
    name, model = tool
    found = evaluate(model, [ROLLING])
    samples = sorted(found["samples"][ROLLING], key=lambda sample: sample["doc_id"])
    documents = [sample["arguments"][0][0] for sample in samples]
    assert max(len(tokenizer(document)["input_ids"]) for document in documents) > 3 * LENGTH
    result = the_run(llm, tokenizer, documents, name)
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        expected = found["results"][ROLLING][f"{metric},none"]
        assert result.figure(metric, name).value == pytest.approx(expected, rel=1e-6), metric


def test_the_back_ends_differ(llm: Any, make_hf: Callable[..., Any]) -> None:
    """Else equality with both would say little; a shorter name stands for one of them."""
    names = ["lm-eval-rolling", "lm-eval-vllm"]
    tokenizer = make_hf().tokenizer
    result = the_run(llm, tokenizer, DOCUMENTS, *names)
    losses = [result.figure("nll", name) for name in names]
    assert [loss.convention for loss in losses] == [LM_EVAL_HF, LM_EVAL_VLLM]
    assert not np.isclose(losses[0].value, losses[1].value, rtol=1e-4)
