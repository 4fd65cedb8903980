"""The CPU kernels on rows that are awkward, and what they must leave alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.ops.cpu_kernels import (
    ALL,
    ISAS,
    begin,
    gather_targets,
    isa,
    kernels,
    reduce_logits,
    score_head,
    set_cpu_isa,
)
from tests.ops.float64_rows import float64_state, hard_rows
from vllm.score.ops import row_state as rs
from vllm.score.ops.kernels import cpu_isa
from vllm.score.ops.row_state import Reduction, Transform

__all__ = ["isa", "kernels"]  # fixtures

EPS = float(np.finfo(np.float32).eps)
INFINITY = float("inf")


def one_target(rows, target=0):
    return torch.full((rows, 1), target)


def log_sum_exp(state):
    return (state[:, rs.MAX] + torch.log(state[:, rs.SUM_EXP])).numpy()


@pytest.mark.parametrize("name", ISAS)
def test_choice(kernels, name):
    if not set_cpu_isa(name):
        pytest.skip(f"no {name} here: not tested")
    assert cpu_isa() == name
    assert not set_cpu_isa("avx1024")
    assert cpu_isa() == name


@pytest.mark.parametrize("place", [0, 5, 700, 1299])
@pytest.mark.parametrize("height", [60.0, 300.0])
def test_peaky_rows(isa, place, height):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1300)).astype(np.float32))
    x[:, place] = height
    state, _ = reduce_logits(x, one_target(3))
    want = float64_state(x.double().numpy())
    np.testing.assert_allclose(log_sum_exp(state), want["lse"], rtol=2 * EPS)
    np.testing.assert_allclose(state[:, rs.SECOND], want["second"])
    # What is left of the others, to its own relative precision.
    rest = state[:, rs.SUM_EXP_X].double().numpy()
    e = np.exp(np.delete(x.double().numpy(), place, 1) - height)
    others = (e * np.log(np.maximum(e, 1e-300))).sum(-1)
    np.testing.assert_allclose(rest, others, rtol=1e-5, atol=1e-35)
    varentropy = state[:, rs.SUM_EXP_DEV2] / state[:, rs.SUM_EXP]
    np.testing.assert_allclose(varentropy, want["varentropy"], rtol=1e-5, atol=1e-35)
    np.testing.assert_allclose(state[:, rs.M2], want["m2"], rtol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 255, 4097])
@pytest.mark.parametrize("level", [0.0, -1e4, 3.25, 1e4])
def test_flat_rows(isa, columns, level):
    state, _ = reduce_logits(torch.full((2, columns), level), one_target(2), first_id=7)
    expected = np.zeros((2, rs.WIDTH))
    expected[:, rs.MAX] = expected[:, rs.MEAN] = level
    expected[:, [rs.SUM_EXP, rs.SUM_EXP2, rs.COUNT]] = columns
    expected[:, rs.SECOND] = level if columns > 1 else -INFINITY
    expected[:, rs.ARGMAX] = 7
    expected[:, rs.RANK] = columns if level > 0 else 0
    np.testing.assert_allclose(state.numpy(), expected, rtol=2 * EPS)


def test_minus_infinity(isa):
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 900)).astype(np.float32))
    x[0, 100:] = -INFINITY  # some
    x[1, :870] = -INFINITY  # a whole first stretch
    x[2] = -INFINITY  # all
    statistics = ALL - rs.MOMENTS_BIT
    state, found = reduce_logits(x, torch.tensor([[3], [3], [3]]), statistics=statistics)
    for row, kept in ((0, x[:1, :100]), (1, x[1:2, 870:])):
        want = float64_state(kept.double().numpy())
        np.testing.assert_allclose(log_sum_exp(state)[row], want["lse"], rtol=4 * EPS, atol=EPS)
        total = state[row, rs.SUM_EXP]
        entropy = torch.log(total) - state[row, rs.SUM_EXP_X] / total
        np.testing.assert_allclose(entropy, want["entropy"], rtol=1e-6)
        varentropy = state[row, rs.SUM_EXP_DEV2] / total
        np.testing.assert_allclose(varentropy, want["varentropy"], rtol=1e-6)
    assert found.tolist() == [[x[0, 3].item()], [-INFINITY], [-INFINITY]]
    # Nothing seen: as it was before, and a later tile may still bring something.
    assert torch.equal(state[2], begin(one_target(1)).state[0])


@pytest.mark.parametrize("tiles", [1, 5])
def test_varentropy_is_accurate_relative_to_itself(isa, tiles):
    """On rows where the mean square and the squared mean, about the maximum, nearly cancel."""
    x = torch.from_numpy(hard_rows(151_936))
    none, statistics = torch.zeros(len(x), 0, dtype=torch.int64), rs.ENTROPY_BIT | rs.VARENTROPY_BIT
    out = begin(none, statistics=statistics)
    for tile in x.tensor_split(tiles, dim=1):
        torch.ops.vllm_score.reduce_logits(tile, *out.arguments)
    varentropy = out.state[:, rs.SUM_EXP_DEV2] / out.state[:, rs.SUM_EXP]
    want = float64_state(x.double().numpy())["varentropy"]
    np.testing.assert_allclose(varentropy, want, rtol=2e-5)


@pytest.mark.parametrize("place", [0, 8, 511, 512, 899])
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("rest", [0.0, -INFINITY])
def test_not_a_number(isa, place, bad, rest):
    x = torch.full((1, 900), rest)
    x[0, place] = bad
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state, _ = reduce_logits(x.to(dtype), one_target(1))
        assert torch.isnan(state[0, rs.SUM_EXP])
    # Nor does a later tile hide it, or an earlier one.
    out = begin(one_target(1))
    torch.ops.vllm_score.reduce_logits(torch.zeros(1, 40), *out.arguments)
    for tile in (x, torch.full((1, 40), 5.0)):
        torch.ops.vllm_score.reduce_logits(tile, *out.at(40).arguments)
        assert torch.isnan(out.state[0, rs.SUM_EXP])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_not_a_number_in_the_head(isa, dtype, bad):
    hidden, weight = torch.ones(40, 33, dtype=dtype), torch.ones(300, 33, dtype=dtype)
    hidden[17, 32] = bad
    state, _ = score_head((hidden, weight, None), one_target(40))
    assert torch.isnan(state[:, rs.SUM_EXP]).tolist() == [row == 17 for row in range(40)]
    weight[299, 0] = bad
    state, _ = score_head((hidden, weight, None), one_target(40))
    assert torch.isnan(state[:, rs.SUM_EXP]).all()


def test_ties(isa):
    x = torch.zeros(4, 600)
    x[0, [599, 20]] = 2.0
    x[1, [3, 4, 5]] = 2.0
    x[2, 550], x[2, 10] = 2.0, 1.0
    x[3, 10], x[3, 550] = 2.0, 1.0
    state, _ = reduce_logits(x, one_target(4), first_id=50)
    assert state[:, rs.ARGMAX].tolist() == [70, 53, 600, 60]
    assert state[:, rs.SECOND].tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize("columns", [9, 600])
def test_rank_leaves_the_target_and_ties_out(isa, columns):
    x = torch.zeros(4, columns)
    x[:, [1, 7]] = 1.0
    x[:, columns - 1] = 2.0
    targets = torch.tensor([[7], [columns - 1], [0], [columns]])
    threshold = torch.tensor([1.0, 1.0, -1.0, -1.0])
    state, _ = reduce_logits(x, targets, threshold=threshold)
    # Above the threshold: the last; the last, which is the target; all but the target; all.
    assert state[:, rs.RANK].tolist() == [1, 0, columns - 1, columns]


@pytest.mark.parametrize("source", ["logits", "head"])
def test_other_columns_are_left_alone(isa, source):
    rng = np.random.default_rng(2)
    hidden, weight = (torch.from_numpy(rng.standard_normal(s)).float() for s in ((6, 20), (90, 20)))
    operator = torch.ops.vllm_score
    of_bit = {
        rs.ENTROPY_BIT: [rs.SUM_EXP_X],
        rs.VARENTROPY_BIT: [rs.SUM_EXP_DEV2],
        rs.COLLISION_BIT: [rs.SUM_EXP2],
        rs.TOP_BIT: [rs.SECOND, rs.ARGMAX],
        rs.MOMENTS_BIT: [rs.MEAN, rs.M2, rs.COUNT],
        rs.RANK_BIT: [rs.RANK],
    }
    for statistics in range(64):
        if statistics & rs.VARENTROPY_BIT and not statistics & rs.ENTROPY_BIT:
            continue  # refused
        targets = torch.tensor([[200, 3]] * 6)
        threshold = torch.zeros(6) if statistics & rs.RANK_BIT else None
        out = Reduction(targets, statistics=statistics, threshold=threshold)
        state, found = out.state, out.target_logits.fill_(77.0)
        idle = [c for bit, columns in of_bit.items() if not statistics & bit for c in columns]
        state[:, idle] = 123.0
        if source == "logits":
            operator.reduce_logits(hidden @ weight.T, *out.arguments)
        else:
            operator.score_head(hidden, weight, None, *out.arguments)
        assert (state[:, idle] == 123.0).all()
        used = [c for c in range(rs.WIDTH) if c not in idle]
        assert not (state[:, used] == 123.0).any()
        assert (found[:, 0] == 77.0).all()
        assert (found[:, 1] != 77.0).all()


@pytest.mark.parametrize("source", ["logits", "head"])
def test_tiles_add_up_to_one_call(isa, source):
    rng = np.random.default_rng(3)
    hidden, weight = (
        torch.from_numpy(rng.standard_normal(s)).float() for s in ((9, 24), (2000, 24))
    )
    targets = torch.from_numpy(rng.integers(0, 2000, (9, 3)))
    threshold = torch.from_numpy(rng.standard_normal(9)).float()
    logits = hidden @ weight.T

    def call(first, last, out):
        rest = out.at(first).arguments
        if source == "logits":
            torch.ops.vllm_score.reduce_logits(logits[:, first:last], *rest)
        else:
            torch.ops.vllm_score.score_head(hidden, weight[first:last], None, *rest)

    results = []
    for bounds in ((0, 2000), (0, 1, 256, 300, 1999, 2000)):
        out = begin(targets, threshold)
        for first, last in pairwise(bounds):
            call(first, last, out)
        results.append((out.state, out.target_logits))
    (one, found_by_one), (many, found_by_many) = results
    assert torch.equal(found_by_one, found_by_many)
    exact = [rs.MAX, rs.SECOND, rs.ARGMAX, rs.COUNT, rs.RANK]
    assert torch.equal(one[:, exact], many[:, exact])
    np.testing.assert_allclose(one, many, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_is_widened_exactly(isa, dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[torch.isfinite(numbers)]
    targets = torch.arange(len(numbers))[None]
    statistics = rs.TOP_BIT
    _, found = reduce_logits(numbers[None], targets, statistics=statistics)
    assert torch.equal(found[0], numbers.float())
    assert torch.equal(torch.signbit(found[0]), torch.signbit(numbers))


def test_exponential(isa):
    d = np.concatenate([-np.geomspace(1e-6, 87, 4000), -np.linspace(0.1, 87, 4000)])
    d = d.astype(np.float32)
    x = np.zeros((len(d), 2), np.float32)
    x[:, 1] = d
    state, _ = reduce_logits(torch.from_numpy(x), one_target(len(d)))
    got = state[:, rs.SUM_EXP_X].double().numpy() / d.astype(np.float64)
    # A product's rounding on top of the exponential's error.
    np.testing.assert_allclose(got, np.exp(d.astype(np.float64)), rtol=2e-7)


def test_soft_cap(isa):
    z = np.geomspace(1e-6, 200, 6000).astype(np.float32)
    z = np.concatenate([-z, [0.0], z]).astype(np.float32)
    _, found = reduce_logits(
        torch.from_numpy(z)[:, None], one_target(len(z)), transform=Transform(soft_cap=30.0)
    )
    want = 30 * np.tanh(z.astype(np.float64) / 30)
    np.testing.assert_allclose(found[:, 0], want, rtol=4e-7)


def test_targets_outside_the_shard(isa):
    hidden, weight = torch.ones(3, 8), torch.arange(5.0)[:, None].expand(5, 8).contiguous()
    targets = torch.tensor([[9, 10, 14], [15, 12, 12], [0, 99, 9]])
    want = torch.full((3, 3), -INFINITY)
    want[0, 1], want[0, 2], want[1, 1:] = 0, 32, 16
    _, found = score_head((hidden, weight, None), targets, first_id=10)
    assert torch.equal(found, want)
    assert torch.equal(gather_targets((hidden, weight, None), targets, first_id=10), want)
