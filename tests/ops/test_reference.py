"""The PyTorch reduction against float64 NumPy, on awkward shapes and on peaky and flat rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.engine.layout import RowLayout
from vllm.score.engine.statistics import STATISTICS
from vllm.score.ops.head import head_product
from vllm.score.ops.reference import reduce_logits
from vllm.score.ops.score_rows import LOGITS_BUDGET_BYTES, chunk_rows, score_chunks


def float64_log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def float64_statistics(x: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    lp = float64_log_softmax(x)
    p = np.exp(lp)
    order = np.sort(lp, axis=-1)[:, ::-1]
    own = np.take_along_axis(x, target[:, None], 1)
    with np.errstate(invalid="ignore"):
        plogp = np.where(p > 0, p * lp, 0.0)
    return {
        "entropy": -plogp.sum(-1),
        "rank": (x > own).sum(-1) + 1.0,
        "argmax": x.argmax(-1).astype(float),
        "argmax_logprob": order[:, 0],
        "margin": order[:, 0] - order[:, 1],
        "collision_probability": (p**2).sum(-1),
        "logit_mean": x.mean(-1),
        "logit_variance": x.var(-1),
    }


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocab=st.sampled_from([2, 3, 31, 257, 4099]),
    k=st.integers(1, 3),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 8.0, 40.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 2**20),
)
def test_reduction_equals_float64(rows, vocab, k, scale, temperature, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, k))
    top = min(3, vocab)
    layout = RowLayout(k, STATISTICS, top, temperature)
    out = reduce_logits(torch.from_numpy(x), torch.from_numpy(targets), layout).numpy()

    scaled = x.astype(np.float64) / temperature
    want = float64_log_softmax(scaled)
    margin = 1e-6 * max(1.0, np.abs(scaled).max()) + 2e-6
    np.testing.assert_allclose(
        out[:, :k], np.take_along_axis(want, targets, 1), atol=margin, rtol=2e-6
    )
    expected = float64_statistics(scaled, targets[:, 0])
    for i, name in enumerate(STATISTICS):
        got = out[:, k + i]
        if name in ("rank", "argmax"):
            np.testing.assert_array_equal(got, expected[name])
        else:
            np.testing.assert_allclose(
                got, expected[name], atol=20 * margin, rtol=1e-5, err_msg=name
            )
    ids = out[:, layout.top_start : layout.top_start + top].astype(int)
    np.testing.assert_allclose(
        np.take_along_axis(want, ids, 1), -np.sort(-want, axis=-1)[:, :top], atol=margin, rtol=2e-6
    )


def test_minus_infinity_logits_are_impossible_tokens():
    x = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    layout = RowLayout(2, ("entropy", "collision_probability"), 0)
    out = reduce_logits(x, torch.tensor([[0, 1]]), layout)[0]
    assert out[0] == pytest.approx(-np.log(2))
    assert out[1] == -torch.inf
    assert out[2] == pytest.approx(np.log(2))
    assert out[3] == pytest.approx(0.5)


def test_nan_logits_stay_nan():
    x = torch.tensor([[0.0, torch.nan, 0.0]])
    assert torch.isnan(reduce_logits(x, torch.tensor([[0]]), RowLayout(1))).all()


def test_input_is_not_modified():
    x = torch.randn(5, 100)
    before = x.clone()
    reduce_logits(x, torch.zeros(5, 1, dtype=torch.int64), RowLayout(1, STATISTICS, 0, 0.7))
    assert torch.equal(x, before)


@pytest.mark.parametrize("vocab", [1000, 32_768, 151_936, 262_144, 2**24])
def test_chunks_keep_the_memory_bound(vocab):
    for width in (1, vocab):
        assert chunk_rows(vocab, width) >= 1
        assert chunk_rows(vocab, width) * vocab * 4 <= max(LOGITS_BUDGET_BYTES, 4 * vocab)


def test_chunked_rows_keep_their_order():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(2500, 8, generator=rng)
    weight = torch.randn(50, 8, generator=rng)
    index = torch.randperm(2500, generator=rng)[:2300]
    targets = torch.randint(0, 50, (2300, 2), generator=rng)
    chunks = list(score_chunks(lambda h: h @ weight.T, hidden, index, targets, RowLayout(2), 50))
    assert len(chunks) > 1
    want = (hidden[index].double() @ weight.double().T).log_softmax(-1).gather(1, targets)
    torch.testing.assert_close(torch.cat(chunks).double(), want, atol=1e-5, rtol=0)


def test_wrong_head_width_gives_nan_not_scores(caplog):
    chunks = score_chunks(
        lambda h: h.new_zeros(len(h), 7),
        torch.zeros(3, 4),
        torch.arange(3),
        torch.zeros(3, 1, dtype=torch.int64),
        RowLayout(1),
        8,
    )
    assert torch.isnan(torch.cat(list(chunks))).all()
    assert "7 logits" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_product_is_the_float32_product(dtype, monkeypatch):
    monkeypatch.setattr("vllm.score.ops.head.WEIGHT_TILE_BYTES", 4 * 16 * 10)  # tiles of 10 rows
    hidden = torch.randn(6, 16).to(dtype)
    weight = torch.randn(33, 16).to(dtype)
    bias = torch.randn(33).to(dtype)
    got = head_product(hidden, weight, bias)
    assert got.dtype == torch.float32
    want = hidden.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=0)
