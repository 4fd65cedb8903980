"""Perplexity on the real engine, against independent loops over Hugging Face's model."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import MAX_MODEL_LEN
from tests.perplexity.engine_run import SETTINGS, TEXT
from tests.perplexity.texts import PROSE
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import perplexity
from vllm.score.perplexity.metrics import EXACT

pytestmark = pytest.mark.engine

Reference = Callable[..., np.ndarray]
ROOT = Path(__file__).parents[2]


def sliding_losses(
    log_softmax: Callable[[list[int]], np.ndarray], ids: list[int], context: int, stride: int
) -> list[float]:
    """Losses of all tokens but the first, each once, by the stride of Hugging Face's guide."""
    losses: list[float] = []
    scored = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        rows = log_softmax(ids[begin:end])
        losses += [-rows[i - 1 - begin, ids[i]] for i in range(max(scored, begin + 1), end)]
        scored = end
        if end == len(ids):
            return losses
    return losses


@pytest.mark.parametrize(
    ("context", "stride", "characters"), [(512, 128, 6_000), (MAX_MODEL_LEN, 500, 9_000)]
)
def test_sliding_windows_equal_hugging_face(
    llm: Any, reference: Reference, context: int, stride: int, characters: int
) -> None:
    ids = llm.get_tokenizer()(PROSE[:characters])["input_ids"]
    assert len(ids) > context + stride
    losses = sliding_losses(lambda window: reference("llama", window), ids, context, stride)
    expected = math.exp(math.fsum(losses) / len(losses))

    result = perplexity(
        llm,
        PROSE[:characters],
        context_length=context,
        stride=stride,
        conventions="hf-stride",
        use_tqdm=False,
    )
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert result.figure("token_perplexity", "hf-stride", EXACT).value == result.perplexity
    table = result.tokens()
    assert table["token_id"].to_pylist() == ids[1:]
    np.testing.assert_allclose(table["logprob"].to_numpy(), -np.array(losses), atol=2e-5, rtol=0)


def test_rows_of_gptq_equal_hugging_face(llm: Any, reference: Reference) -> None:
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    losses = []
    for begin in range(0, len(ids) - 511, 512):
        row = ids[begin : begin + 512]
        losses += (-reference("llama", row)[np.arange(511), row[1:]]).tolist()
    result = perplexity(
        llm, TEXT, context_length=256, stride=64, conventions="gptq:512", use_tqdm=False
    )
    figure = result.figure("token_perplexity", "gptq:512")
    assert figure.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)


def test_token_ids_and_text_agree(llm: Any) -> None:
    ids = llm.get_tokenizer()(TEXT)["input_ids"]
    text = perplexity(llm, TEXT, use_tqdm=False, **SETTINGS)
    given = perplexity(llm, ids, use_tqdm=False, **SETTINGS)
    assert given.nll == text.nll
    assert given.tokens()["logprob"] == text.tokens()["logprob"]


def test_figures_say_where_they_come_from(llm: Any) -> None:
    found = perplexity(llm, TEXT, use_tqdm=False, **SETTINGS).provenance
    assert (found.dtype, found.quantization) == ("float32", "none")
    assert found.model == llm.llm_engine.model_config.model
    assert len(found.model_sha256) == len(found.tokenizer_sha256) == 64
    assert {"torch", "transformers", "vllm-score"} <= set(found.versions)
    assert (found.context_length, found.stride, found.bos) == (256, 64, "none")


def test_windows_longer_than_the_engine(llm: Any) -> None:
    with pytest.raises(
        ScoreModeError, match=f"context_length .* is 4096, .*give {MAX_MODEL_LEN} or"
    ):
        perplexity(llm, TEXT, context_length=4096, use_tqdm=False)


def test_an_engine_refusal_leaves_the_engine_usable(llm: Any) -> None:
    beyond = llm.llm_engine.model_config.get_vocab_size()
    with pytest.raises(ScoreModeError, match="requests"):
        perplexity(llm, [1, 2, beyond], use_tqdm=False, **SETTINGS)
    assert perplexity(llm, [1, 2, 3], use_tqdm=False, **SETTINGS).provenance.scored_tokens == 2


def test_killed_and_resumed_gives_the_same_bits(
    llm: Any, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    process = start(model_dir("llama"), "store", str(store))
    while len(list(store.glob("*/*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stored = {path: path.read_bytes() for path in store.glob("*/*.parquet")}

    whole = perplexity(llm, TEXT, use_tqdm=False, **SETTINGS)
    groups = -(-whole.provenance.windows // (SETTINGS["group_tokens"] // 256))
    assert 3 <= len(stored) < groups, "killed too late to show anything"
    resumed = perplexity(llm, TEXT, store=store, resume=True, use_tqdm=False, **SETTINGS)
    assert resumed.nll.hex() == whole.nll.hex()
    assert resumed.figures == whole.figures
    assert resumed.tokens() == whole.tokens()
    assert all(path.read_bytes() == content for path, content in stored.items())

    with pytest.raises(ScoreModeError, match=r"settings\.stride was 64, is now 32"):
        perplexity(llm, TEXT, store=store, resume=True, **{**SETTINGS, "stride": 32})
    with pytest.raises(ScoreModeError, match=r"text\.sha256 was"):
        perplexity(llm, TEXT + "!", store=store, resume=True, **SETTINGS)


def test_another_model_refuses_to_resume(llm: Any, tmp_path: Path) -> None:
    perplexity(llm, TEXT, store=tmp_path / "store", use_tqdm=False, **SETTINGS)
    manifest = tmp_path / "store" / "manifest.json"
    before = json.loads(manifest.read_text())
    before["fingerprint"]["model"]["weights_sha256"] = "f" * 64
    before["fingerprint"]["engine"]["dtype"] = "bfloat16"
    manifest.write_text(json.dumps(before))
    with pytest.raises(ScoreModeError) as raised:
        perplexity(llm, TEXT, store=tmp_path / "store", resume=True, **SETTINGS)
    assert "engine.dtype was 'bfloat16', is now 'float32'" in str(raised.value)
    assert "model.weights_sha256 was 'ffff" in str(raised.value)


def test_an_engine_in_its_own_process_gives_the_same_bits_every_time(
    model_dir: Callable[..., Path],
) -> None:
    process = start(model_dir("llama"), "repeat", "4", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    output, errors = process.communicate()
    losses = [line for line in output.splitlines() if line.startswith("loss")]
    assert len(losses) == 4, errors
    assert len(set(losses)) == 1, losses


def start(model: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.perplexity.engine_run", str(model), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
