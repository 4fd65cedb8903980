"""Conventions against their tools' procedures, run by transformers on the same weights.

Hugging Face's guide and GPTQ's evaluation are short loops around a model's own `labels`; those of
ExLlamaV3 and llama.cpp end in logits, which transformers gives as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import with_bos
from tests.perplexity.bigram import IDENTITY
from tests.perplexity.texts import PROSE
from vllm.score.data import as_source
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import PerplexityResult, Settings, prepare
from vllm.score.perplexity.metrics import EXACT, GUIDE_CURRENT, GUIDE_UNTIL_2024
from vllm.score.perplexity.run import engine_scorer, score_job

pytestmark = pytest.mark.engine

# The third document brings a BOS of its own, the first one where a tool may put one, too.
DOCUMENTS = [f"<|bos|>{PROSE[:900]}", "", f"<|bos|>{PROSE[5000:5900]}", "x"]
JOINED = "\n\n".join(DOCUMENTS)
CONTEXT, STRIDE = 96, 40
PPL = "token_perplexity"


@pytest.fixture(scope="module")
def hugging_face(model_dir: Callable[..., Path]) -> Any:
    from transformers import AutoModelForCausalLM

    folder = model_dir("llama")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(params=["adds nothing", "adds a BOS", "adds a BOS and an EOS"])
def tokenizer(request: pytest.FixtureRequest, model_dir: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir("llama"))
    if request.param == "adds nothing":
        return tokenizer
    return with_bos(tokenizer, eos="EOS" in request.param)


def run(llm: Any, tokenizer: Any, *names: str) -> PerplexityResult:
    settings = Settings(context_length=CONTEXT, stride=STRIDE, conventions=names, group_tokens=4096)
    job = prepare(settings, as_source(DOCUMENTS), tokenizer)
    return score_job(job, engine_scorer(llm), IDENTITY, use_tqdm=False)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-5)  # of a perplexity, from float32 scores


@torch.no_grad()
def guide(model: Any, ids: torch.Tensor) -> tuple[float, float, float]:
    """The guide's perplexity, that of its text until 2024, and the mean over all tokens."""
    total = weights = previous_end = tokens = 0
    losses, exact = [], 0.0
    for begin in range(0, ids.shape[1], STRIDE):
        end = min(begin + CONTEXT, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : -(end - previous_end)] = -100
        loss = model(window, labels=labels).loss.item()
        weight = int((labels != -100).sum()) - 1
        total, weights = total + loss * weight, weights + weight
        scored = int((labels[:, 1:] != -100).sum())
        exact, tokens = exact + loss * scored, tokens + scored
        losses.append(loss)
        previous_end = end
        if end == ids.shape[1]:
            break
    plain = sum(losses) / len(losses)
    return math.exp(total / weights), math.exp(plain), math.exp(exact / tokens)


def test_hugging_face_s_guide(llm: Any, hugging_face: Any, tokenizer: Any) -> None:
    ids = tokenizer(JOINED, return_tensors="pt").input_ids
    current, until_2024, exact = guide(hugging_face, ids)
    result = run(llm, tokenizer, "hf-stride")
    assert result.figure(PPL, "hf-stride", GUIDE_CURRENT).value == close(current)
    assert result.figure(PPL, "hf-stride", GUIDE_UNTIL_2024).value == close(until_2024)
    assert result.figure(PPL, "hf-stride", EXACT).value == close(exact)
    assert current != close(exact) != until_2024


@torch.no_grad()
def test_gptq(llm: Any, hugging_face: Any, tokenizer: Any) -> None:
    ids, size = tokenizer(JOINED, return_tensors="pt").input_ids, 128
    samples = ids.numel() // size
    rows = [ids[:, i * size : (i + 1) * size] for i in range(samples)]
    nlls = [hugging_face(row, labels=row).loss * size for row in rows]
    expected = torch.exp(torch.stack(nlls).sum() / (samples * size)).item()
    figure = run(llm, tokenizer, f"gptq:{size}").figure(PPL, f"gptq:{size}")
    assert figure.value == close(expected)
    assert figure.provenance.windows == samples > 3


@torch.no_grad()
def test_exllamav3(llm: Any, hugging_face: Any, tokenizer: Any) -> None:
    ids = tokenizer(JOINED, add_special_tokens=False, return_tensors="pt").input_ids
    size = 4  # 100 rows of which are not the whole text
    starts = list(range(0, ids.shape[1] - size, size))[:100]
    rows = torch.cat([ids[:, a : a + size] for a in starts])
    logprobs = hugging_face(rows).logits[:, :-1].log_softmax(-1)
    scored = logprobs.gather(-1, rows[:, 1:, None])
    figure = run(llm, tokenizer, f"exllamav3:{size}").figure(PPL, f"exllamav3:{size}")
    assert figure.value == close(math.exp(-scored.mean().item()))
    assert figure.provenance.scored_tokens == scored.numel() == 300


@torch.no_grad()
def test_llama_cpp(llm: Any, hugging_face: Any, tokenizer: Any) -> None:
    size = 64
    ids = tokenizer(JOINED, return_tensors="pt").input_ids
    if ids[0, -1] == tokenizer.eos_token_id:
        with pytest.raises(ScoreModeError, match=r"adds \[1\] behind a text, .* refuses"):
            run(llm, tokenizer, f"llama.cpp:{size}")
        return
    chunks = ids[0, : ids.shape[1] // size * size].view(-1, size)
    seen = chunks.clone()
    if len(tokenizer("")["input_ids"]):
        seen[:, 0] = tokenizer.bos_token_id
    first = size // 2
    logprobs = hugging_face(seen).logits[:, first : size - 1].log_softmax(-1)
    nll = -logprobs.gather(-1, chunks[:, first + 1 :, None])
    figure = run(llm, tokenizer, f"llama.cpp:{size}").figure(PPL, f"llama.cpp:{size}")
    assert figure.value == close(math.exp(nll.mean().item()))
    assert figure.provenance.scored_tokens == nll.numel()
