"""The fused product of compute capability 9.0, against float64 on the same GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from vllm.score.ops import kernels
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import Reduction, Transform

pytestmark = pytest.mark.cuda

USUAL = rs.ENTROPY_BIT | rs.TOP_BIT | rs.RANK_BIT
EVERYTHING = USUAL | rs.COLLISION_BIT | rs.MOMENTS_BIT
GPU = torch.device("cuda")
INF = float("inf")


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    problem = kernels.load("cuda")
    assert problem is None, problem
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the fused kernel is written for compute capability 9.0")


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    bias: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    first_id: int = 0
    scale: float = 1.0
    soft_cap: float = 0.0
    temperature: float = 1.0
    statistics: int = 0

    @classmethod
    def random(cls, rows, size, columns, dtype=torch.bfloat16, k=1, spread=3.0, **rest) -> Problem:
        torch.manual_seed(rows * 31 + size * 7 + columns)
        hidden = torch.randn(rows, size, device=GPU).to(dtype)
        weight = (torch.randn(columns, size, device=GPU) * (spread / size**0.5)).to(dtype)
        first = rest.get("first_id", 0)
        # Some targets are in other shards.
        targets = torch.randint(max(0, first - 2), first + columns + 2, (rows, k), device=GPU)
        threshold = torch.randn(rows, device=GPU) * spread
        return cls(hidden, weight, targets, threshold=threshold, **rest)

    def run(self, state=None, found=None) -> tuple[torch.Tensor, torch.Tensor]:
        """State and target logits, added to the given ones."""
        transform = Transform(self.scale, self.soft_cap, self.temperature)
        threshold = self.threshold if self.statistics & rs.RANK_BIT else None
        out = Reduction(self.targets, transform, self.statistics, threshold, self.first_id)
        if state is not None:
            out = replace(out, state=state, target_logits=found)
        torch.ops.vllm_score.score_head(self.hidden, self.weight, self.bias, *out.arguments)
        torch.cuda.synchronize()
        return out.state, out.target_logits

    def logits(self, dtype=torch.float64) -> torch.Tensor:
        """x [R, n] by PyTorch; float32: the products' accumulators, as cuBLAS gives them."""
        if dtype == torch.float64:
            z = self.hidden.double() @ self.weight.double().T
        else:
            z = torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32)
        if self.bias is not None:
            z = z + self.bias.to(dtype)
        if self.soft_cap > 0:
            z = self.soft_cap * torch.tanh(z / self.soft_cap)
        return self.scale * z / self.temperature


def check(problem: Problem, rows: torch.Tensor | None = None) -> None:
    """All columns that were asked for, and the targets; `rows` [R] bool: only these."""
    state, found = problem.run()
    x, plain = problem.logits(), problem.logits(torch.float32)
    if rows is not None:
        state, found, x, plain = state[rows], found[rows], x[rows], plain[rows]
        targets, threshold = problem.targets[rows], problem.threshold[rows]
    else:
        targets, threshold = problem.targets, problem.threshold
    columns = x.shape[1]
    # The logits are off by as much as the products of plain PyTorch, and 3e-5 more.
    far = float((plain.double() - x).abs().max()) + 3e-5
    m = x.max(1, keepdim=True).values
    e, d = (x - m).exp(), x - m
    total = e.sum(1)

    def close(column: torch.Tensor, want: torch.Tensor, atol: float) -> None:
        torch.testing.assert_close(column.double(), want, rtol=0, atol=atol)

    close(state[:, rs.MAX], m[:, 0], far)
    close(rs.log_sum_exp(state), x.logsumexp(1), far)
    mask = problem.statistics
    if mask & rs.ENTROPY_BIT:
        mean = state[:, rs.SUM_EXP_X] / state[:, rs.SUM_EXP]
        close(mean, (e * d).sum(1) / total, 4 * far)
    else:
        assert (state[:, rs.SUM_EXP_X] == 0).all()
    if mask & rs.COLLISION_BIT:
        collision = state[:, rs.SUM_EXP2] / state[:, rs.SUM_EXP] ** 2
        close(collision, (e * e).sum(1) / total**2, 4 * far)
    if mask & rs.TOP_BIT:
        best = state[:, rs.ARGMAX].long()[:, None] - problem.first_id
        close(x.gather(1, best)[:, 0], m[:, 0], 2 * far)
        second = x.topk(2).values[:, 1] if columns > 1 else torch.full_like(total, -INF)
        close(state[:, rs.SECOND], second, far)
    else:
        assert (state[:, rs.ARGMAX] == -1).all()
    if mask & rs.MOMENTS_BIT:
        close(state[:, rs.MEAN], x.mean(1), far)
        assert (state[:, rs.COUNT] == columns).all()
        torch.testing.assert_close(
            state[:, rs.M2].double() / columns, x.var(1, correction=0), rtol=1e-5, atol=far
        )
    if mask & rs.RANK_BIT:
        ids = torch.arange(columns, device=GPU) + problem.first_id
        others = ids != targets[:, :1]
        least = ((x > threshold[:, None] + far) & others).sum(1)
        most = ((x > threshold[:, None] - far) & others).sum(1)
        assert ((least <= state[:, rs.RANK]) & (state[:, rs.RANK] <= most)).all()
    inside = (targets >= problem.first_id) & (targets < problem.first_id + columns)
    want = x.gather(1, (targets - problem.first_id).clamp(0, columns - 1))
    assert (found[~inside] == -INF).all()
    close(found[inside], want[inside], far)


# Rows: of one block, of a pair, beyond; sizes that fill no stage; columns that fill no tile.
SHAPES = [(1, 8, 1), (1, 4096, 2), (9, 72, 3), (64, 64, 256), (128, 512, 1024), (129, 520, 257),
          (300, 1024, 50_257), (777, 1000, 3001), (2048, 256, 20_000), (8192, 64, 300)]  # fmt: skip


@pytest.mark.parametrize("statistics", [0, USUAL, EVERYTHING])
@pytest.mark.parametrize(("rows", "size", "columns"), SHAPES)
def test_odd_shapes(rows, size, columns, statistics):
    check(Problem.random(rows, size, columns, statistics=statistics))


@pytest.mark.parametrize("statistics", [1, 2, 4, 8, 16, 12, 20])
def test_only_the_statistics_asked_for_are_written(statistics):
    check(Problem.random(200, 128, 1500, statistics=statistics))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", [0, EVERYTHING])
@pytest.mark.parametrize(
    "numbers",
    [
        {"scale": 0.3, "temperature": 0.7},
        {"soft_cap": 5.0},
        {"scale": 2.0, "soft_cap": 30.0, "temperature": 1.5},
        {"scale": -1.0},
        {"scale": 0.0},
    ],
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_transforms(dtype, statistics, numbers, with_bias):
    problem = Problem.random(
        150, 264, 1111, dtype, k=3, first_id=70_000, statistics=statistics, **numbers
    )
    if with_bias:
        problem.bias = torch.randn(1111, device=GPU).to(dtype)
    check(problem)


def test_rows_with_strides():
    problem = Problem.random(200, 1024, 900, statistics=USUAL)
    check(replace(problem, hidden=problem.hidden[:, 512:], weight=problem.weight[::2, :512]))
    odd = replace(problem, hidden=problem.hidden[:, 8:1009], weight=problem.weight[:, 16:1017])
    check(odd)


@pytest.mark.parametrize("spread", [1e-3, 60.0])
def test_flat_and_peaky_rows(spread):
    check(Problem.random(260, 256, 5000, spread=spread, statistics=EVERYTHING))


def test_rows_far_from_zero():
    """All logits around +-200, where an exponential of the logit itself would not do."""
    problem = Problem.random(256, 128, 3000, statistics=EVERYTHING)
    problem.weight[:, 0] = 20.0
    problem.hidden[:128, 0] = 10.0
    problem.hidden[128:, 0] = -10.0
    check(problem)


def test_a_rising_row():
    """Every tile has a larger maximum than all before it, by more than any float32 exponent."""
    problem = Problem.random(130, 64, 4096, statistics=EVERYTHING)
    problem.hidden[:, 0] = 1.0
    problem.weight[:, 0] = torch.arange(4096, device=GPU).bfloat16()
    check(problem)
    problem.weight[:, 0] *= -1
    check(problem)


def test_ties_have_the_lowest_id():
    problem = Problem.random(40, 64, 3000, statistics=USUAL)
    problem.hidden.zero_()
    state, _ = problem.run()
    assert (state[:, rs.MAX] == 0).all() and (state[:, rs.SECOND] == 0).all()
    assert (state[:, rs.ARGMAX] == 0).all()
    torch.testing.assert_close(state[:, rs.SUM_EXP], torch.full_like(state[:, 0], 3000))
    problem = Problem.random(40, 64, 3000, statistics=USUAL)
    problem.weight[2900] = problem.weight[1203] = problem.weight[17] = 4 * problem.weight[17]
    state, _ = problem.run()
    best = problem.logits().argmax(1)
    best = torch.where((best == 2900) | (best == 1203), 17, best)
    assert (state[:, rs.ARGMAX] == best).all() and (best == 17).any()
    assert (state[best == 17, rs.SECOND] == state[best == 17, rs.MAX]).all()


@pytest.mark.parametrize("statistics", [0, USUAL, EVERYTHING])
def test_rows_that_are_not_finite(statistics):
    problem = Problem.random(300, 128, 1500, statistics=statistics)
    problem.hidden[2, 5], problem.hidden[3, 7] = math.nan, INF
    problem.hidden[299, 127] = math.nan
    state, _ = problem.run()
    bad = torch.zeros(300, dtype=torch.bool, device=GPU)
    bad[[2, 3, 299]] = True
    assert state[bad, rs.SUM_EXP].isnan().all()
    check(problem, ~bad)


@pytest.mark.parametrize("statistics", [0, EVERYTHING])
def test_minus_infinity_is_a_legal_logit(statistics):
    problem = Problem.random(140, 128, 1500, statistics=statistics & ~rs.MOMENTS_BIT)
    problem.bias = torch.zeros(1500, device=GPU).bfloat16()
    problem.bias[[0, 7, 1499]] = -INF
    problem.targets.clamp_(1, 6)
    state, _ = problem.run()
    x = problem.logits()
    torch.testing.assert_close(rs.log_sum_exp(state).double(), x.logsumexp(1), rtol=0, atol=3e-5)
    if statistics:
        p = x.softmax(1)
        d = torch.where(p > 0, x - x.max(1, keepdim=True).values, 0.0)
        mean = (state[:, rs.SUM_EXP_X] / state[:, rs.SUM_EXP]).double()
        torch.testing.assert_close(mean, (p * d).sum(1), rtol=0, atol=1e-4)
    problem.bias[:] = -INF
    state, _ = problem.run()
    assert (state[:, rs.MAX] == -INF).all() and (state[:, rs.SUM_EXP] == 0).all()
    assert not state.isnan().any()


@pytest.mark.parametrize("statistics", [0, EVERYTHING])
@pytest.mark.parametrize("cut", [1, 700, 1499])
def test_parts_of_the_vocabulary_add_up(statistics, cut):
    whole = Problem.random(300, 256, 1500, statistics=statistics)
    state, found = whole.run()
    part = replace(whole, weight=whole.weight[:cut])
    both = replace(whole, weight=whole.weight[cut:], first_id=cut)
    summed, targets = both.run(*part.run())
    torch.testing.assert_close(summed, state, rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, found)
    exact = [rs.MAX, rs.SECOND, rs.ARGMAX, rs.COUNT, rs.RANK]
    assert torch.equal(summed[:, exact], state[:, exact])


@pytest.mark.parametrize(("rows", "size", "columns"), [(2000, 512, 20_000), (4100, 128, 9000)])
def test_the_same_bits_every_time(rows, size, columns):
    problem = Problem.random(rows, size, columns, statistics=EVERYTHING)
    first, targets = problem.run()
    for _ in range(5):
        again, targets_again = problem.run()
        assert torch.equal(first, again) and torch.equal(targets, targets_again)


def test_the_target_is_the_logit_that_was_summed():
    """With a threshold equal to the target's own logit, only larger ones are counted."""
    problem = Problem.random(500, 512, 4000, scale=0.7, temperature=1.3, statistics=USUAL)
    problem.targets.clamp_(0, 3999)
    _, found = problem.run()
    # Twins of the target have the same logit to the bit, and are not above it.
    twin = torch.where(problem.targets[0, 0] == 5, 6, 5)
    problem.weight[twin] = problem.weight[problem.targets[0, 0]]
    problem.threshold = found[:, 0].contiguous()
    state, again = problem.run()
    x = problem.logits(torch.float64)
    assert torch.equal(again, found)
    higher = (x > x.gather(1, problem.targets) + 1e-5).sum(1)
    assert state[0, rs.RANK] == higher[0]
    assert ((state[:, rs.RANK] - higher).abs() <= 1).all()


def test_extra_memory_does_not_grow_with_the_vocabulary():
    """Float32 logits of these would take 0.3 and 1.3 GB."""
    for columns in (20_000, 80_000):
        problem = Problem.random(4096, 64, columns)
        problem.run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run()
        assert torch.cuda.max_memory_allocated() - before < 4 << 20


def test_what_it_cannot_do_is_refused():
    problem = Problem.random(10, 100, 50)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        problem.run()
    problem = Problem.random(10, 104, 50, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="bfloat16 or float16"):
        problem.run()
    problem = Problem.random(10, 104, 50, statistics=rs.ENTROPY_BIT | rs.VARENTROPY_BIT)
    with pytest.raises(RuntimeError, match="does not compute the varentropy"):
        problem.run()
