"""The one-pass CUDA reduction, the gathered dot products and the tiled product, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.ops.float64_rows import float64_state, hard_rows
from vllm.score.ops import kernels
from vllm.score.ops import row_state as rs
from vllm.score.ops.row_state import IDENTITY, Reduction, Transform
from vllm.score.ops.statistics import STATISTICS

# The sets of statistics that reduce.cu is compiled for: none, these four.
USUAL = rs.ENTROPY_BIT | rs.TOP_BIT | rs.RANK_BIT
MOST = USUAL | rs.COLLISION_BIT | rs.MOMENTS_BIT
USUAL_AND_VARENTROPY = USUAL | rs.VARENTROPY_BIT
EVERYTHING = MOST | rs.VARENTROPY_BIT
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_tiles_of_the_head_stay_in_their_memory_and_cover_odd_shapes():
    for rows in (1, 7, 1024, 8192, 100_000):
        for columns in (1, 255, 4096, 151_936, 300_000):
            tile_rows, tile_columns = kernels.tile_shape(rows, columns)
            assert 1 <= tile_rows <= rows and 1 <= tile_columns <= columns
            assert tile_rows * tile_columns * 4 <= 64 << 20


@pytest.mark.parametrize("shape", [None, (3, 7), (64, 50), (1, 1)])
def test_the_tiled_product_equals_float64_in_any_tiling(shape):
    rng = np.random.default_rng(1)
    rows, columns, size, first_id = 11, 50, 24, 100
    hidden, weight = rng.standard_normal((rows, size)), rng.standard_normal((columns, size))
    bias = rng.standard_normal(columns)
    targets = rng.integers(first_id - 20, first_id + columns + 20, (rows, 2))
    z = hidden.astype(np.float32) @ weight.astype(np.float32).T.astype(np.float64) + bias
    transform = Transform(2.0, 5.0, 0.5)
    out = Reduction(torch.from_numpy(targets), transform, rs.TOP_BIT, first_id=first_id)
    operands = (torch.from_numpy(a).float() for a in (hidden, weight, bias))
    kernels.score_head_tiled(*operands, out, shape)
    x = 2 * 5 * np.tanh(z / 5) / 0.5
    check_state(out.state.numpy(), x, first_id, targets, None, rs.TOP_BIT)
    check_targets(out.target_logits.numpy(), x, first_id, targets)


def check_state(
    state: np.ndarray,
    x: np.ndarray,
    first_id: int,
    targets: np.ndarray,
    threshold: np.ndarray | None,
    statistics: int,
    tolerance: float = 3e-5,
) -> None:
    """A float32 state against the float64 logits of all columns; sums to `tolerance` relative."""
    m = x.max(1)
    d = x - m[:, None]
    e = np.exp(d)
    close = {"rtol": tolerance, "atol": tolerance}
    np.testing.assert_allclose(state[:, rs.MAX], m, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(state[:, rs.SUM_EXP], e.sum(1), **close)
    if statistics & rs.ENTROPY_BIT:
        np.testing.assert_allclose(state[:, rs.SUM_EXP_X], (e * d).sum(1), **close)
    if statistics & rs.VARENTROPY_BIT:
        apart = d - ((e * d).sum(1) / e.sum(1))[:, None]
        np.testing.assert_allclose(state[:, rs.SUM_EXP_DEV2], (e * apart**2).sum(1), **close)
    if statistics & rs.COLLISION_BIT:
        np.testing.assert_allclose(state[:, rs.SUM_EXP2], (e * e).sum(1), **close)
    if statistics & rs.TOP_BIT:
        order = np.sort(x, axis=1)
        second = order[:, -2] if x.shape[1] > 1 else np.full(len(x), -np.inf)
        np.testing.assert_allclose(state[:, rs.SECOND], second, rtol=1e-6, atol=1e-5)
        best = state[:, rs.ARGMAX].astype(int) - first_id
        # Float32 may see a tie where float64 does not.
        chosen = np.take_along_axis(x, best[:, None], 1)[:, 0]
        np.testing.assert_allclose(chosen, m, rtol=1e-6, atol=1e-5)
    if statistics & rs.MOMENTS_BIT:
        np.testing.assert_allclose(state[:, rs.MEAN], x.mean(1), **close)
        np.testing.assert_allclose(state[:, rs.M2] / x.shape[1], x.var(1), **close)
        assert (state[:, rs.COUNT] == x.shape[1]).all()
    if statistics & rs.RANK_BIT:
        ids = first_id + np.arange(x.shape[1])
        above = (x.astype(np.float32) > threshold[:, None]) & (ids != targets[:, :1])
        np.testing.assert_array_equal(state[:, rs.RANK], above.sum(1))


def check_targets(found: np.ndarray, x: np.ndarray, first_id: int, targets: np.ndarray) -> None:
    inside = (targets >= first_id) & (targets < first_id + x.shape[1])
    want = np.take_along_axis(x, np.where(inside, targets - first_id, 0), 1)
    assert (found[~inside] == -np.inf).all()
    np.testing.assert_allclose(found[inside], want[inside], rtol=2e-6, atol=2e-5)


def reduced(x: torch.Tensor, targets, first_id, threshold, transform, statistics, parts=1):
    """State and target logits of rows fed to the native reduction in `parts` tiles."""
    out = Reduction(targets, transform, statistics, threshold)
    for tile in x.tensor_split(parts, dim=1):
        kernels.reduce_logits(tile, out.at(first_id))
        first_id += tile.shape[1]
    return out.state, out.target_logits


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    assert kernels.choose_kernel("cuda").name == "native"
    return torch.device("cuda")


# One row a warp, one a block of either size; ends that fill no vector.
SHAPES = [(1, 1), (3, 5), (5, 130), (9, 1024), (7, 1031), (4, 4099), (300, 2049), (2, 16391),
          (3, 151_936), (2, 300_001)]  # fmt: skip


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("statistics", [0, USUAL, MOST, USUAL_AND_VARENTROPY, EVERYTHING])
def test_reduction_equals_float64(gpu, rows, columns, dtype, statistics):
    rng = np.random.default_rng(rows + columns)
    first_id = 1000
    # Rows start anywhere, 16-byte aligned or not.
    padded = torch.from_numpy(rng.standard_normal((rows, columns + 5)) * 4).to(dtype)
    logits = padded.to(gpu)[:, 3 : 3 + columns]
    x = logits.double().cpu().numpy()
    targets = rng.integers(first_id, first_id + columns, (rows, 3))
    targets[0, 1] = 7
    threshold = np.take_along_axis(x, targets[:, :1] - first_id, 1)[:, 0].astype(np.float32)
    for parts in (1, 3):
        state, found = reduced(
            logits,
            torch.from_numpy(targets).to(gpu),
            first_id,
            torch.from_numpy(threshold).to(gpu),
            IDENTITY,
            statistics,
            parts,
        )
        check_state(state.cpu().numpy(), x, first_id, targets, threshold, statistics)
        check_targets(found.cpu().numpy(), x, first_id, targets)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("statistics", "written"),
    [
        (rs.COLLISION_BIT, [rs.SUM_EXP2]),
        (rs.ENTROPY_BIT | rs.VARENTROPY_BIT, [rs.SUM_EXP_X, rs.SUM_EXP_DEV2]),
    ],
)
def test_reduction_transforms_and_leaves_unasked_columns_alone(gpu, statistics, written):
    rng = np.random.default_rng(3)
    z = rng.standard_normal((6, 5000)) * 20
    targets = rng.integers(0, 5000, (6, 1))
    logits = torch.from_numpy(z).float().to(gpu)
    state, found = reduced(
        logits, torch.from_numpy(targets).to(gpu), 0, None, Transform(1.3, 30.0, 0.7), statistics, 2
    )
    x = 1.3 * 30 * np.tanh(z / 30) / 0.7
    check_state(state.cpu().numpy(), x, 0, targets, None, statistics)
    check_targets(found.cpu().numpy(), x, 0, targets)
    untouched = [c for c in range(rs.WIDTH) if c not in (rs.MAX, rs.SUM_EXP, *written)]
    fresh = Reduction(torch.from_numpy(targets).to(gpu)).state
    assert torch.equal(state[:, untouched], fresh[:, untouched])


@pytest.mark.cuda
@pytest.mark.parametrize("statistics", [USUAL_AND_VARENTROPY, EVERYTHING])
@pytest.mark.parametrize("columns", [700, 9000, 151_936])
@pytest.mark.parametrize("parts", [1, 5])
def test_varentropy_is_accurate_relative_to_itself(gpu, columns, statistics, parts):
    """On rows where the mean square and the squared mean, about the maximum, nearly cancel."""
    rows = np.concatenate([hard_rows(columns), np.full((1, columns), 3.7, np.float32)])
    logits, none = torch.from_numpy(rows).to(gpu), torch.zeros(len(rows), 1, dtype=torch.int64)
    threshold = torch.zeros(len(rows), device=gpu)
    state, _ = reduced(logits, none.to(gpu), 0, threshold, IDENTITY, statistics, parts)
    varentropy = (state[:, rs.SUM_EXP_DEV2] / state[:, rs.SUM_EXP]).cpu()
    want = float64_state(rows.astype(np.float64))["varentropy"]
    np.testing.assert_allclose(varentropy, want, rtol=3e-5, atol=1e-10)


@pytest.mark.cuda
@pytest.mark.parametrize("columns", [40, 3000, 40_000])
def test_infinities_and_nan(gpu, columns):
    logits = torch.randn(5, columns, device=gpu)
    logits[1, columns // 2] = float("nan")
    logits[2, columns - 1] = float("inf")
    logits[3] = float("-inf")
    logits[4, : columns - 1] = float("-inf")
    targets = torch.zeros(5, 1, dtype=torch.int64, device=gpu)
    zeros = torch.zeros(5, device=gpu)
    state, _ = reduced(logits, targets, 0, zeros, IDENTITY, EVERYTHING, 3)
    sums = state[:, rs.SUM_EXP].cpu()
    assert sums[0].isfinite() and sums[1].isnan() and sums[2].isnan()
    assert sums[3] == 0 and state[3, rs.MAX] == float("-inf")
    assert sums[4] == 1 and state[4, rs.ARGMAX] == columns - 1
    assert state[3:, rs.SUM_EXP_X].cpu().tolist() == [0, 0]
    assert state[3:, rs.SUM_EXP_DEV2].cpu().tolist() == [0, 0]
    varentropy = STATISTICS["varentropy"].formula(state)
    assert varentropy[0].isfinite() and varentropy[1:3].isnan().all() and varentropy[4] == 0


@pytest.mark.cuda
@pytest.mark.parametrize("columns", [700, 9000, 50_000])
def test_equal_logits_take_the_lowest_id_and_bits_repeat(gpu, columns):
    logits = torch.randint(-3, 4, (64, columns), device=gpu).bfloat16()
    targets = torch.randint(columns, (64, 1), device=gpu)
    threshold = logits.gather(1, targets)[:, 0].float()
    arguments = (targets, 0, threshold, IDENTITY, EVERYTHING)
    state, found = reduced(logits, *arguments, 2)
    want = logits.float().cpu().numpy()
    assert (state[:, rs.ARGMAX].cpu().numpy() == want.argmax(1)).all()
    assert (state[:, rs.SECOND] == state[:, rs.MAX]).all()
    own = np.take_along_axis(want, targets.cpu().numpy(), 1)
    assert (state[:, rs.RANK].cpu().numpy() == (want > own).sum(1)).all()
    again, found_again = reduced(logits, *arguments, 2)
    assert torch.equal(state, again) and torch.equal(found, found_again)
    # A row's bits do not depend on the rows beside it.
    alone, _ = reduced(logits[5:6], targets[5:6], 0, threshold[5:6], *arguments[3:], 2)
    assert torch.equal(alone[0], state[5])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 100, 129, 4096])
def test_gathered_products_equal_float64(gpu, dtype, size):
    rng = np.random.default_rng(size)
    hidden = torch.from_numpy(rng.standard_normal((19, size))).to(gpu, dtype)
    weight = torch.from_numpy(rng.standard_normal((77, size)) / size**0.5).to(gpu, dtype)
    bias = torch.from_numpy(rng.standard_normal(77)).to(gpu, dtype)
    targets = rng.integers(0, 120, (19, 4))
    z = hidden.double() @ weight.double().T + bias.double()
    x = (1.5 * 6 * torch.tanh(z / 6) / 0.8).cpu().numpy()
    out = Reduction(torch.from_numpy(targets).to(gpu), Transform(1.5, 6.0, 0.8), first_id=20)
    kernels.target_logits(hidden, weight, bias, out)
    check_targets(out.target_logits.cpu().numpy(), x, 20, targets)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_tiled_product_on_the_gpu_equals_float64(gpu, dtype, monkeypatch):
    rng = np.random.default_rng(5)
    rows, columns, size = 1100, 40_000, 256
    hidden = torch.from_numpy(rng.standard_normal((rows, size))).to(gpu, dtype)
    weight = torch.from_numpy(rng.standard_normal((columns, size)) * 3 / 16).to(gpu, dtype)
    targets = torch.from_numpy(rng.integers(0, columns, (rows, 1))).to(gpu)
    x = (hidden.double() @ weight.double().T).cpu().numpy()
    for name in ("pytorch", "native"):
        monkeypatch.setenv(kernels.KERNEL_VARIABLE, name)
        assert kernels.choose_kernel("cuda").name == name
        out = Reduction(targets, statistics=rs.TOP_BIT)
        kernels.score_head_tiled(hidden, weight, None, out)
        check_state(out.state.cpu().numpy(), x, 0, targets.cpu().numpy(), None, rs.TOP_BIT)
        check_targets(out.target_logits.cpu().numpy(), x, 0, targets.cpu().numpy())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("statistics", [USUAL_AND_VARENTROPY, EVERYTHING])
def test_the_head_with_the_varentropy_equals_float64(gpu, dtype, statistics):
    """Of a size that the fused product serves, which leaves the varentropy to the tiled one."""
    rng = np.random.default_rng(6)
    rows, columns, size = 300, 9000, 256
    hidden = torch.from_numpy(rng.standard_normal((rows, size))).to(gpu, dtype)
    weight = torch.from_numpy(rng.standard_normal((columns, size)) * 3 / 16).to(gpu, dtype)
    targets = torch.from_numpy(rng.integers(0, columns, (rows, 1))).to(gpu)
    # Far from any logit, so that rounding decides no rank.
    threshold = torch.full((rows,), 100.0, device=gpu)
    out = Reduction(targets, statistics=statistics, threshold=threshold)
    kernels.score_head(hidden, weight, None, out)
    x = (hidden.double() @ weight.double().T).cpu().numpy()
    ids, limit = targets.cpu().numpy(), threshold.cpu().numpy()
    check_state(out.state.cpu().numpy(), x, 0, ids, limit, statistics, tolerance=1e-4)
    check_targets(out.target_logits.cpu().numpy(), x, 0, ids)


@pytest.mark.cuda
def test_errors_name_the_argument(gpu):
    logits = torch.randn(3, 50, device=gpu)
    targets = torch.zeros(3, 1, dtype=torch.int64, device=gpu)
    out = Reduction(targets)
    with pytest.raises(RuntimeError, match="state is on another device"):
        kernels.reduce_logits(logits, replace(out, state=out.state.cpu()))
    with pytest.raises(RuntimeError, match="logits must have contiguous rows"):
        kernels.reduce_logits(logits.T[:3], out)


@pytest.mark.cuda
def test_the_rule_of_the_head_holds(gpu):
    hidden = torch.zeros(2048, 64, dtype=torch.bfloat16, device=gpu)
    weight = torch.zeros(300, 64, dtype=torch.bfloat16, device=gpu)
    capable = torch.cuda.get_device_capability() == kernels.FUSED_CAPABILITY
    assert kernels.head_path(hidden, weight) == ("fused" if capable else "tiled")
    assert kernels.head_path(hidden, weight, EVERYTHING) == "tiled"
    assert kernels.head_path(hidden[:1], weight) == "tiled"
    assert kernels.head_path(hidden.float(), weight.float()) == "tiled"
    odd = torch.zeros(300, 65, dtype=torch.bfloat16, device=gpu)
    assert kernels.head_path(hidden, odd[:, :64]) == "tiled"
    assert kernels.head_path(hidden, odd[:, 1:]) == "tiled"
