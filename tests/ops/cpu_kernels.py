"""Calls of the CPU kernels, and the fixtures that choose their instruction set."""

from __future__ import annotations

import ctypes

import pytest
import torch

from vllm.score.ops import row_state as rs
from vllm.score.ops.kernels import cpu_isa, library_function, load
from vllm.score.ops.row_state import IDENTITY, Reduction

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
    if (problem := load("cpu")) is not None:
        pytest.skip(problem)
    threads, chosen = torch.get_num_threads(), cpu_isa()
    yield
    torch.set_num_threads(threads)
    set_cpu_isa(chosen)


def set_cpu_isa(name: str) -> bool:
    """Use this instruction set from now on; False, and nothing changes, when this CPU cannot."""
    function = library_function("cpu", "vllm_score_set_cpu_isa", ctypes.c_bool)
    return bool(function(name.encode()))


def runnable_isas() -> list[str]:
    """The instruction sets of this machine; the chosen one stays."""
    if load("cpu") is not None:
        return ["not built"]
    chosen = cpu_isa()
    names = [name for name in ISAS if set_cpu_isa(name)]
    set_cpu_isa(chosen)
    return names


@pytest.fixture(params=runnable_isas())
def isa(request, kernels):
    assert set_cpu_isa(request.param)
    return request.param


def begin(targets, threshold=None, transform=IDENTITY, statistics=ALL, first_id=0):
    """A reduction; the threshold is 0 where none is given."""
    if threshold is None:
        threshold = torch.zeros(len(targets))
    return Reduction(targets, transform, statistics, threshold, first_id)


def reduce_logits(x, targets, **options):
    """State and target logits of one call."""
    out = begin(targets, **options)
    torch.ops.vllm_score.reduce_logits(x, *out.arguments)
    return out.state, out.target_logits


def score_head(head, targets, **options):
    """State and target logits of one call; head is (hidden, weight, bias or None)."""
    out = begin(targets, **options)
    torch.ops.vllm_score.score_head(*head, *out.arguments)
    return out.state, out.target_logits


def gather_targets(head, targets, *, transform=IDENTITY, first_id=0):
    out = Reduction(targets, transform, first_id=first_id)
    torch.ops.vllm_score.target_logits(*head, *out.arguments)
    return out.target_logits
