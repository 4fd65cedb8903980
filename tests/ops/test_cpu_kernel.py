"""The CPU kernels on every instruction set of this machine against float64 NumPy.

Results may be off by what plain float32 PyTorch is off, plus a margin: a few roundings of the
largest sum of absolute values that occurs (`unit`).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.cpu_kernels import ALL, gather_targets, isa, kernels, reduce_logits, score_head
from tests.ops.float64_rows import float64_state, float64_transform
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import IDENTITY, Transform

__all__ = ["isa", "kernels"]  # fixtures

EPS = float(np.finfo(np.float32).eps)
CAPPED = Transform(1.5, 20.0, 0.7)
FIRST_ID = 1000

# The function-scoped fixture sets the same instruction set for all examples.
property_test = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def strided(rng, rows, columns, dtype, scale=1.0):
    """A random matrix whose rows do not lie end to end."""
    pad = int(rng.integers(0, 4))
    wide = torch.from_numpy(rng.standard_normal((rows, columns + pad)).astype(np.float32) * scale)
    return wide.to(dtype)[:, :columns]


def random_head(seed, rows, hidden_size, columns, dtype, with_bias):
    rng = np.random.default_rng(seed)
    bias = strided(rng, 1, columns, dtype)[0].contiguous() if with_bias else None
    hidden = strided(rng, rows, hidden_size, dtype, 3.0)
    return hidden, strided(rng, columns, hidden_size, dtype, hidden_size**-0.5), bias


def random_targets(seed, rows, k, columns):
    """Ids of the columns and of some beside them; rows with one target twice among them."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(-9, columns + 9, (rows, k)) + FIRST_ID)


def logits_float64(head, transform):
    """x in float64 and, of each row, the float32 rounding unit of its largest sum."""
    hidden, weight, bias = (None if t is None else t.double().numpy() for t in head)
    z, size = hidden @ weight.T, np.abs(hidden) @ np.abs(weight).T
    if bias is not None:
        z, size = z + bias, size + np.abs(bias)
    unit = EPS * size.max(-1) * abs(transform.scale) / transform.temperature
    return float64_transform(z, transform), unit


def logits_float32(head, transform):
    """The same as plain PyTorch computes it."""
    hidden, weight, bias = (None if t is None else t.float() for t in head)
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    return float32_transform(z, transform)


def float32_transform(z, transform):
    if transform.soft_cap > 0:
        z = torch.tanh(z / transform.soft_cap) * transform.soft_cap
    return z * transform.scale / transform.temperature


def check_state(state, want, x, tolerance):
    """Compare a state with float64; x [R, n] float64, tolerance [R]: the allowed error of an x."""
    state = state.double().numpy()
    n = x.shape[1]
    lse = state[:, rs.MAX] + np.log(state[:, rs.SUM_EXP])
    # An average of the errors of x, and the roundings of the sum and the logarithm.
    assert (np.abs(lse - want["lse"]) <= tolerance + 4 * EPS * (1 + np.abs(lse))).all()
    total = state[:, rs.SUM_EXP]
    entropy = np.log(total) - state[:, rs.SUM_EXP_X] / total
    # d entropy = -sum p (log p + entropy) dx: at most twice the logarithm of n.
    loose = (tolerance + 8 * EPS) * (4 + 2 * np.log(n))
    assert (np.abs(entropy - want["entropy"]) <= loose).all()
    # d varentropy = sum p ((x - mean)^2 - varentropy + 2 (x - mean)) dx, and terms in dx^2; its own
    # sums are accurate relative to the result. EPS**4: float64's roundings of a flat row.
    want_v = want["varentropy"]
    loose = 4 * tolerance * (want_v + np.sqrt(want_v) + tolerance) + 64 * EPS * want_v + EPS**4
    assert (np.abs(state[:, rs.SUM_EXP_DEV2] / total - want_v) <= loose).all()
    collision = state[:, rs.SUM_EXP2] / total**2
    assert (np.abs(collision - want["collision"]) <= 4 * tolerance + 8 * EPS).all()
    assert (np.abs(state[:, rs.MAX] - want["max"]) <= tolerance).all()
    if n > 1:
        assert (np.abs(state[:, rs.SECOND] - want["second"]) <= tolerance).all()
    else:
        assert (state[:, rs.SECOND] == -np.inf).all()
    best = x[np.arange(len(x)), state[:, rs.ARGMAX].astype(int) - FIRST_ID]
    assert (best >= want["max"] - 2 * tolerance).all()
    assert (np.abs(state[:, rs.MEAN] - want["mean"]) <= tolerance + 2 * EPS).all()
    deviation = np.sqrt(want["m2"] / n)
    spread = n * (4 * deviation * tolerance + 4 * tolerance**2) + 8 * EPS * want["m2"]
    assert (np.abs(state[:, rs.M2] - want["m2"]) <= spread).all()
    assert (state[:, rs.COUNT] == n).all()


def check_rank(state, x, targets, threshold, tolerance):
    ids = FIRST_ID + np.arange(x.shape[1])
    others = ids[None] != targets[:, :1].numpy()
    limit = threshold.double().numpy()[:, None]
    room = tolerance[:, None]
    rank = state[:, rs.RANK].numpy()
    assert ((others & (x > limit + room)).sum(-1) <= rank).all()
    assert (rank <= (others & (x > limit - room)).sum(-1)).all()


def check_targets(found, x, targets, error_of_torch, unit):
    """Ids of the shard within the margin of PyTorch's own error, others untouched."""
    column = targets.numpy() - FIRST_ID
    inside = (column >= 0) & (column < x.shape[1])
    assert (found.numpy()[~inside] == -np.inf).all()
    want = np.take_along_axis(x, np.where(inside, column, 0), 1)
    off = np.abs(found.double().numpy() - want)
    allowed = (error_of_torch + 2 * unit)[:, None] + np.zeros_like(off)
    assert (off[inside] <= allowed[inside]).all()


@property_test
@given(
    rows=st.sampled_from([1, 2, 5, 17, 33]),
    hidden_size=st.sampled_from([1, 2, 33, 100, 512, 1057]),
    columns=st.sampled_from([1, 7, 255, 256, 300, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    k=st.sampled_from([0, 1, 3, 40]),
    bias=st.booleans(),
    transform=st.sampled_from([IDENTITY, CAPPED]),
    seed=st.integers(0, 2**20),
)
def test_head_equals_float64(isa, rows, hidden_size, columns, dtype, k, bias, transform, seed):
    head = random_head(seed, rows, hidden_size, columns, dtype, bias)
    targets = random_targets(seed, rows, k, columns)
    threshold = torch.from_numpy(np.random.default_rng(seed).standard_normal(rows)).float()
    statistics = ALL if k else ALL - rs.RANK_BIT
    options = {"transform": transform, "first_id": FIRST_ID}
    state, found = score_head(head, targets, threshold=threshold, statistics=statistics, **options)
    x, unit = logits_float64(head, transform)
    error = np.abs(logits_float32(head, transform).double().numpy() - x).max(-1)
    check_state(state, float64_state(x), x, error + 2 * unit)
    check_targets(found, x, targets, error, unit)
    if k:
        check_rank(state, x, targets, threshold, error + 2 * unit)
    # The operator that only gathers gives the very same numbers.
    assert torch.equal(found, gather_targets(head, targets, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_group(isa, dtype):
    head = random_head(0, 1100, 40, 300, dtype, True)
    targets = random_targets(0, 1100, 1, 300)
    state, found = score_head(head, targets, first_id=FIRST_ID)
    x, unit = logits_float64(head, IDENTITY)
    error = np.abs(logits_float32(head, IDENTITY).double().numpy() - x).max(-1)
    check_state(state, float64_state(x), x, error + 2 * unit)
    check_targets(found, x, targets, error, unit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_whatever_threads_and_rows(isa, dtype):
    head = random_head(1, 70, 600, 3000, dtype, True)
    targets = random_targets(1, 70, 2, 3000)
    torch.set_num_threads(1)
    want = score_head(head, targets)
    torch.set_num_threads(2)
    for first, last in ((0, 70), (0, 1), (13, 30), (33, 70)):
        part = slice(first, last)
        got = score_head((head[0][part], *head[1:]), targets[part].contiguous())
        assert torch.equal(got[0], want[0][part])
        assert torch.equal(got[1], want[1][part])


@property_test
@given(
    rows=st.integers(1, 9),
    columns=st.sampled_from([1, 2, 7, 31, 513, 1000, 20000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    k=st.sampled_from([1, 2, 5]),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    transform=st.sampled_from([IDENTITY, CAPPED]),
    seed=st.integers(0, 2**20),
)
def test_reduction_equals_float64(isa, rows, columns, dtype, k, spread, transform, seed):
    rng = np.random.default_rng(seed)
    logits = strided(rng, rows, columns, dtype, spread)
    targets = random_targets(seed, rows, k, columns)
    x = float64_transform(logits.double().numpy(), transform)
    # Three roundings and the soft cap's tanh.
    unit = (0.0 if transform == IDENTITY else 4 * EPS) * np.abs(x).max(-1)
    threshold = float32_transform(logits.float(), transform)[:, 0].contiguous()
    state, found = reduce_logits(
        logits, targets, threshold=threshold, transform=transform, first_id=FIRST_ID
    )
    check_state(state, float64_state(x), x, unit + EPS * np.abs(x).max(-1))
    check_targets(found, x, targets, np.zeros(rows), unit)
    check_rank(state, x, targets, threshold, unit)
    if transform == IDENTITY:
        assert np.array_equal(state[:, rs.ARGMAX], FIRST_ID + x.argmax(-1))
        assert np.array_equal(state[:, rs.MAX], x.max(-1))
