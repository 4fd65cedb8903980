"""The PyTorch reduction against float64 NumPy, on awkward shapes and on peaky and flat rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.score.ops import row_state as rs
from vllm.score.ops.reference import reduce_logits, score_head, target_logits
from vllm.score.ops.row_state import Reduction, Transform
from vllm.score.ops.statistics import STATISTICS, RowLayout, score_columns, statistics_mask

# The others are not of the row state.
STATE_STATISTICS = tuple(s for s in STATISTICS if s not in ("head_mass", "model_logprob"))


def reduce(x: torch.Tensor, targets: torch.Tensor, layout: RowLayout, parts: int = 1):
    """All columns of `layout` but the most likely tokens, from `parts` tiles of the vocabulary."""
    threshold = x.float().gather(1, targets[:, :1])[:, 0] / layout.temperature
    mask = statistics_mask(layout.statistics)
    sums = Reduction(targets, Transform(temperature=layout.temperature), mask, threshold)
    first = 0
    for tile in x.tensor_split(parts, dim=1):
        reduce_logits(tile, sums.at(first))
        first += tile.shape[1]
    out = torch.empty(len(x), layout.num_targets + len(layout.statistics))
    score_columns(sums, layout, out, {})
    return out


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
        "varentropy": (p * (x - (p * x).sum(-1, keepdims=True)) ** 2).sum(-1),
        "rank": (x > own).sum(-1) + 1.0,
        "argmax": x.argmax(-1).astype(float),
        "argmax_logprob": order[:, 0],
        "margin": order[:, 0] - order[:, 1],
        "collision_probability": (p**2).sum(-1),
        "logsumexp": np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1),
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
    parts=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_reduction_equals_float64(rows, vocab, k, scale, temperature, parts, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, vocab)) * scale).astype(np.float32)
    targets = rng.integers(0, vocab, (rows, k))
    layout = RowLayout(k, STATE_STATISTICS, 0, temperature)
    out = reduce(torch.from_numpy(x), torch.from_numpy(targets), layout, parts).numpy()

    scaled = x.astype(np.float64) / temperature
    want = float64_log_softmax(scaled)
    margin = 1e-6 * max(1.0, np.abs(scaled).max()) + 2e-6
    np.testing.assert_allclose(
        out[:, :k], np.take_along_axis(want, targets, 1), atol=margin, rtol=2e-6
    )
    expected = float64_statistics(scaled, targets[:, 0])
    for i, name in enumerate(STATE_STATISTICS):
        got = out[:, k + i]
        if name in ("rank", "argmax"):
            np.testing.assert_array_equal(got, expected[name])
        else:
            np.testing.assert_allclose(
                got, expected[name], atol=20 * margin, rtol=1e-5, err_msg=name
            )


def test_minus_infinity_logits_are_impossible_tokens():
    x = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    names = ("entropy", "collision_probability", "varentropy", "logsumexp")
    layout = RowLayout(2, names, 0)
    for parts in (1, 2, 4):  # with four, tiles of -inf alone
        out = reduce(x, torch.tensor([[0, 1]]), layout, parts)[0]
        assert out[0] == pytest.approx(-np.log(2))
        assert out[1] == -torch.inf
        assert out[2] == pytest.approx(np.log(2))
        assert out[3] == pytest.approx(0.5)
        assert out[4] == 0
        assert out[5] == pytest.approx(np.log(2))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinite_logits_give_nan(bad):
    x = torch.tensor([[0.0, bad, 0.0, 1.0, 2.0, 3.0]])
    for parts in (1, 2, 3):
        layout = RowLayout(1, ("entropy", "varentropy", "logsumexp"))
        assert torch.isnan(reduce(x, torch.tensor([[0]]), layout, parts)).all()


def test_input_is_not_modified():
    x = torch.randn(5, 100)
    before = x.clone()
    reduce(x, torch.zeros(5, 1, dtype=torch.int64), RowLayout(1, STATE_STATISTICS, 0, 0.7))
    assert torch.equal(x, before)


def test_columns_not_asked_for_are_left_alone():
    sums = Reduction(torch.zeros(3, 0, dtype=torch.int64))
    sums.state[:, 2:] = 7.0
    reduce_logits(torch.randn(3, 9), sums)
    assert (sums.state[:, 2:] == 7).all()


def test_varentropy_needs_the_entropys_bit():
    none = torch.zeros(2, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match="needs the entropy's bit"):
        reduce_logits(torch.randn(2, 9), Reduction(none, statistics=rs.VARENTROPY_BIT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_head_with_soft_cap_scale_and_shard(dtype, bias, monkeypatch):
    monkeypatch.setattr("vllm.score.ops.reference.WEIGHT_TILE_BYTES", 4 * 16 * 10)  # 10 columns
    rng = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(6, 16, generator=rng)).to(dtype)
    weight = torch.randn(33, 16, generator=rng).to(dtype)
    offset = torch.randn(33, generator=rng).to(dtype) if bias else None
    targets = torch.randint(0, 33, (6, 2), generator=rng)
    x = hidden.double() @ weight.double().T + (offset.double() if bias else 0)
    x = torch.tanh(x / 5) * 5 * 0.7 / 1.3
    parts = []
    for first, last in ((0, 20), (20, 33)):
        shard = None if offset is None else offset[first:last]
        part, again = (
            Reduction(targets, Transform(0.7, 5.0, 1.3), rs.ENTROPY_BIT, first_id=first)
            for _ in range(2)
        )
        score_head(hidden, weight[first:last], shard, part)
        target_logits(hidden, weight[first:last], shard, again)
        torch.testing.assert_close(again.target_logits, part.target_logits, atol=2e-5, rtol=0)
        parts.append(part)
    merged = rs.merge(torch.stack([part.state for part in parts]))
    found = torch.stack([part.target_logits for part in parts]).amax(0)
    layout = RowLayout(2, ("entropy",))
    out = torch.empty(6, 3)
    score_columns(Reduction(targets, state=merged, target_logits=found), layout, out, {})
    want = x.log_softmax(-1)
    torch.testing.assert_close(out[:, :2].double(), want.gather(1, targets), atol=2e-5, rtol=0)
    entropy = -(want.exp() * want).sum(-1)
    torch.testing.assert_close(out[:, 2].double(), entropy, atol=5e-5, rtol=0)
