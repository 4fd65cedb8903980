"""Calls of the CPU kernels, and the fixtures that choose their instruction set."""

from __future__ import annotations

import pytest
import torch

from tests.ops.float64_rows import IDENTITY
from vllm.score.ops import library
from vllm.score.ops import row_state as rs

ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")
ALL = (
    rs.ENTROPY_BIT
    | rs.VARENTROPY_BIT
    | rs.COLLISION_BIT
    | rs.TOP_BIT
    | rs.MOMENTS_BIT
    | rs.RANK_BIT
)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    if (problem := library.load("cpu")) is not None:
        pytest.skip(problem)
    threads, chosen = torch.get_num_threads(), library.cpu_isa()
    yield
    torch.set_num_threads(threads)
    library.set_cpu_isa(chosen)


def runnable_isas() -> list[str]:
    """The instruction sets of this machine; the chosen one stays."""
    if library.load("cpu") is not None:
        return ["not built"]
    chosen = library.cpu_isa()
    names = [name for name in ISAS if library.set_cpu_isa(name)]
    library.set_cpu_isa(chosen)
    return names


@pytest.fixture(params=runnable_isas())
def isa(request, kernels):
    assert library.set_cpu_isa(request.param)
    return request.param


def reduce_logits(x, targets, *, threshold=None, transform=IDENTITY, statistics=ALL, first_id=0):
    """State and target logits of one call."""
    state, found = rs.new_state(len(x), x.device), rs.new_target_logits(*targets.shape, x.device)
    if threshold is None:
        threshold = torch.zeros(len(x))
    torch.ops.vllm_score.reduce_logits(
        x, targets, first_id, threshold, *transform, statistics, state, found
    )
    return state, found


def score_head(head, targets, *, threshold=None, transform=IDENTITY, statistics=ALL, first_id=0):
    """State and target logits of one call; head is (hidden, weight, bias or None)."""
    rows = len(head[0])
    state, found = rs.new_state(rows, head[0].device), rs.new_target_logits(*targets.shape, "cpu")
    if threshold is None:
        threshold = torch.zeros(rows)
    torch.ops.vllm_score.score_head(
        *head, targets, first_id, threshold, *transform, statistics, state, found
    )
    return state, found


def gather_targets(head, targets, *, transform=IDENTITY, first_id=0):
    found = rs.new_target_logits(*targets.shape, "cpu")
    torch.ops.vllm_score.target_logits(*head, targets, first_id, *transform, found)
    return found
