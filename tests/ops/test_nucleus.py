"""Top-p: the nucleus against sorted sums in float64 NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vllm.score.ops.top_p import FIRST_LOOK, nucleus


def sorted_sums(row: np.ndarray, top_p: float) -> tuple[float, int, float, float]:
    """Floor, surplus and mass of a row, and how near its sums come to `top_p`."""
    x = np.asarray(row, dtype=np.float64)
    p = np.exp(x - x.max())
    order = np.argsort(-x)
    sums = np.cumsum(p[order] / p.sum())
    n = min(int((sums < top_p).sum()) + 1, len(x))
    floor = x[order[n - 1]]
    return floor, int((x >= floor).sum()) - n, sums[n - 1], float(abs(sums - top_p).min())


def check(x: torch.Tensor, top_p: float, tolerance: float, known_partition: bool = False) -> None:
    before = x.clone()
    partition = x.double().logsumexp(1).to(x.dtype) if known_partition else None
    floor, surplus, mass = nucleus(x, top_p, log_partition=partition)
    assert torch.equal(x, before)
    assert floor.dtype == mass.dtype == x.dtype and surplus.dtype == torch.int64
    for r, row in enumerate(x.double().cpu().numpy()):
        expected = sorted_sums(row, top_p)
        assert (floor[r].item(), surplus[r].item()) == expected[:2]
        assert mass[r].item() == pytest.approx(expected[2], abs=tolerance)


@settings(max_examples=150, deadline=None)
@given(
    x=hnp.arrays(
        np.float64,
        st.tuples(st.integers(1, 4), st.integers(1, 40)),
        # Steps of a half: ties everywhere, also at the boundary.
        elements=st.integers(-20, 20).map(lambda n: n / 2),
    ),
    top_p=st.one_of(st.floats(1e-6, 0.999), st.sampled_from([1e-6, 0.5, 0.9])),
    known_partition=st.booleans(),
)
def test_any_rows(x: np.ndarray, top_p: float, known_partition: bool) -> None:
    assume(all(sorted_sums(row, top_p)[3] > 1e-9 for row in x))
    check(torch.from_numpy(x), top_p, 1e-12, known_partition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [FIRST_LOOK - 1, FIRST_LOOK, FIRST_LOOK + 1, 5000])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0, 20.0])
def test_rows_beyond_the_first_look(size: int, scale: float, dtype: torch.dtype) -> None:
    x = (torch.randn(6, size, generator=torch.Generator().manual_seed(size)) * scale).to(dtype)
    for top_p in (0.1, 0.7, 0.97):
        near = [sorted_sums(row, top_p)[3] for row in x.double().numpy()]
        clear = torch.tensor(near) > (1e-6 if dtype == torch.float32 else 1e-12)
        assert clear.sum() >= 4
        check(x[clear], top_p, 1e-6 if dtype == torch.float32 else 1e-12)


def test_whole_rows_are_sorted_in_blocks() -> None:
    size = 400_000  # four rows a block
    x = torch.randn(9, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[3] *= 30  # a narrow one among wide ones
    check(x, 0.8, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("known_partition", [False, True])
def test_equal_tokens_are_counted_as_fractions_say(
    dtype: torch.dtype, known_partition: bool
) -> None:
    """k of V equal tokens have exactly k/V, whatever 1/V is in floating point."""
    for size in (2, 3, 7, 10, 50, 2000, 20_000):
        x = torch.full((2, size), -1.25, dtype=dtype)
        partition = x.logsumexp(1) if known_partition else None
        for kept in {1, max(1, size // 3), max(1, size * 9 // 10)}:
            floor, surplus, mass = nucleus(x, kept / size, log_partition=partition)
            assert floor.tolist() == [-1.25] * 2
            assert surplus.tolist() == [size - kept] * 2
            assert mass.numpy() == pytest.approx(kept / size, rel=1e-5)


def test_tokens_without_probability_are_left_out() -> None:
    x = torch.tensor([[0.0, -math.inf, -200.0], [-3.0, -3.0, -3.0]])
    floor, surplus, mass = nucleus(x, 0.999)
    assert (floor.tolist(), surplus.tolist(), mass.tolist()) == ([0, -3], [0, 0], [1, 1])


def test_rows_that_are_no_distribution_are_nan() -> None:
    x = torch.randn(5, 2000)
    x[1, 3], x[2, 1999], x[3] = math.nan, math.inf, -math.inf
    floor, surplus, mass = nucleus(x, 0.5)
    assert floor.isnan().tolist() == mass.isnan().tolist() == [False, True, True, True, False]
    assert (surplus >= 0).all()


def test_no_rows() -> None:
    assert [len(part) for part in nucleus(torch.zeros(0, 4), 0.5)] == [0, 0, 0]


def test_rows_do_not_depend_on_their_neighbours_or_layout() -> None:
    x = torch.randn(40, 3000, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        0.1, 9, 40
    ).unsqueeze(1)
    together = torch.stack([part.double() for part in nucleus(x, 0.9)])
    alone = [torch.stack([p.double() for p in nucleus(row[None], 0.9)]) for row in x]
    assert torch.equal(together, torch.cat(alone, dim=1))
    across = nucleus(x.t().contiguous().t(), 0.9)  # its sums are taken in another order
    assert torch.equal(together[:2], torch.stack([part.double() for part in across[:2]]))
    assert across[2].numpy() == pytest.approx(together[2].numpy(), rel=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_on_a_gpu(rows: int, scale: float) -> None:
    x = torch.randn(rows, 50_000, generator=torch.Generator().manual_seed(2)) * scale
    x = x.double().cuda()
    for top_p in (0.2, 0.9):
        check(x, top_p, 1e-11)
        first, second = nucleus(x.float(), top_p), nucleus(x.float(), top_p)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
