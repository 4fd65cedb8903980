"""Merging states of parts of the vocabulary, in any split and any grouping, against float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.float64_rows import float64_state, hard_rows
from vllm.score.ops import row_state as rs
from vllm.score.ops.reference import reduce_logits
from vllm.score.ops.row_state import Reduction
from vllm.score.ops.statistics import STATISTICS, statistics_mask

CPU = torch.device("cpu")
SUMS = rs.ENTROPY_BIT | rs.VARENTROPY_BIT | rs.COLLISION_BIT | rs.TOP_BIT
COLUMNS = 600


def state_of(x: torch.Tensor, first_id: int) -> torch.Tensor:
    none = torch.zeros(len(x), 0, dtype=torch.int64)
    out = Reduction(none, statistics=SUMS, first_id=first_id)
    reduce_logits(x, out)
    return out.state


def statistic(name: str, state: torch.Tensor) -> torch.Tensor:
    formula = STATISTICS[name].formula
    return formula(state)


def kinds_of_rows(seed: int) -> np.ndarray:
    """Flat, peaky and tied rows, some with -inf, some where much cancels: float32 [R, COLUMNS]."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((6, COLUMNS))
    normal[0] *= 30
    normal[1] = np.round(normal[1])
    normal[2] = 7.5
    normal[3, rng.integers(COLUMNS)] = 60
    # All but one, half of them, and whole parts.
    normal[4, np.arange(COLUMNS) != rng.integers(COLUMNS)] = -np.inf
    normal[5, rng.integers(0, COLUMNS, COLUMNS // 2)] = -np.inf
    sparse = rng.standard_normal((1, COLUMNS))
    sparse[0, rng.integers(COLUMNS // 2) :] = -np.inf
    sparse[0, 0] = 1.0
    return np.concatenate([normal, sparse, hard_rows(COLUMNS)]).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, COLUMNS), max_size=9),
    grouping=st.integers(1, 5),
    seed=st.integers(0, 2**20),
)
def test_any_split_gives_the_measures_of_the_whole(cuts, grouping, seed):
    rows = kinds_of_rows(seed)
    x = torch.from_numpy(rows)
    states = [state_of(x[:, a:b], a) for a, b in pairwise([0, *sorted(cuts), COLUMNS])]
    groups = [states[i : i + grouping] for i in range(0, len(states), grouping)]
    state = rs.merge(torch.stack([rs.merge(torch.stack(group)) for group in groups]))
    for row, got in zip(rows.astype(np.float64), state, strict=True):
        want = {n: v[0] for n, v in float64_state(row[np.isfinite(row)][None]).items()}
        values = {
            name: float(statistic(name, got[None]))
            for name in ("entropy", "varentropy", "logsumexp", "collision_probability", "margin")
        }
        assert values["entropy"] == pytest.approx(want["entropy"], abs=4e-6)
        # Relative: nothing cancels.
        assert values["varentropy"] == pytest.approx(want["varentropy"], rel=1e-5, abs=1e-12)
        assert values["logsumexp"] == pytest.approx(want["lse"], rel=1e-6, abs=1e-6)
        assert values["collision_probability"] == pytest.approx(want["collision"], rel=1e-5)
        assert values["margin"] == pytest.approx(want["max"] - want["second"], rel=1e-6)
        assert got[rs.ARGMAX] == row.argmax()


def test_the_varentropy_of_a_flat_row_is_zero_in_any_split():
    x = torch.full((1, COLUMNS), 3.7)
    for cuts in ([], [1], [200, 400], [599]):
        parts = [state_of(x[:, a:b], a) for a, b in pairwise([0, *cuts, COLUMNS])]
        state = rs.merge(torch.stack(parts))
        assert statistic("varentropy", state).item() == 0


def test_parts_without_a_finite_logit_change_nothing():
    x = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    state, empty = state_of(x, 0), state_of(torch.full((4, 9), -torch.inf), COLUMNS)
    new = Reduction(torch.zeros(4, 0, dtype=torch.int64)).state
    for parts in ([state, empty], [empty, state], [new, state, new]):
        merged = rs.merge(torch.stack(parts))
        for column in (rs.MAX, rs.SUM_EXP, rs.SUM_EXP_X, rs.SUM_EXP2, rs.SUM_EXP_DEV2):
            assert torch.equal(merged[:, column], state[:, column])
    nothing = rs.merge(torch.stack([new, empty]))
    assert (nothing[:, [rs.SUM_EXP, rs.SUM_EXP_X, rs.SUM_EXP_DEV2]] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 5, 9])
def test_a_part_that_is_not_a_number_spoils_the_row(bad, place):
    x = torch.zeros(1, 10)
    x[0, place] = bad
    merged = rs.merge(torch.stack([state_of(x[:, :3], 0), state_of(x[:, 3:], 3)]))
    for name in ("entropy", "varentropy", "logsumexp", "collision_probability"):
        assert torch.isnan(statistic(name, merged)).all(), name


def test_every_statistic_has_its_bits():
    for name in STATISTICS:
        mask = statistics_mask((name,))
        assert 0 <= mask < 64
        # The operators refuse the varentropy's bit alone.
        assert bool(mask & rs.VARENTROPY_BIT) <= bool(mask & rs.ENTROPY_BIT)
    assert statistics_mask(("varentropy",)) & rs.VARENTROPY_BIT
    assert statistics_mask(("logsumexp", "head_mass", "model_logprob")) == 0
