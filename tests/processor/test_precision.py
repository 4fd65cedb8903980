"""Dtypes of forward passes and of the arithmetic on logits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vllm.score.errors import ScoreModeError
from vllm.score.processor.precision import (
    apply_global_precision,
    forward_precision_ctx,
    parse_dtype,
    scoring_dtype,
)


@pytest.fixture
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("allow_tf32", "asked", "expected"),
    [
        (False, "high", "highest"),
        (False, "highest", "highest"),
        (True, "high", "high"),
        (True, "medium", "medium"),
    ],
)
def test_tf32_only_where_it_is_allowed(allow_tf32: bool, asked: str, expected: str) -> None:
    apply_global_precision(allow_tf32, asked)
    assert torch.get_float32_matmul_precision() == expected
    assert torch.backends.cudnn.allow_tf32 is allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is (expected != "highest")


@pytest.mark.usefixtures("as_before")
def test_an_unknown_precision_changes_nothing() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ScoreModeError, match=r"matmul_precision must be one of .*'fast'"):
        apply_global_precision(True, "fast")
    assert torch.get_float32_matmul_precision() == before


def test_autocast_is_what_is_asked_whatever_surrounds_it() -> None:
    x = torch.ones(2, 2)
    with forward_precision_ctx(True, torch.bfloat16, "cpu"):
        assert (x @ x).dtype == torch.bfloat16
        with forward_precision_ctx(False, torch.bfloat16, "cpu"):
            assert (x @ x).dtype == torch.float32
    with pytest.raises(ScoreModeError, match="autocast to float64 does not exist"):
        forward_precision_ctx(True, torch.float64, "cpu")


def test_scoring_dtype() -> None:
    assert scoring_dtype(torch.float32, False) == torch.float32
    assert scoring_dtype(torch.float64, True) == torch.float64
    assert scoring_dtype(torch.bfloat16, True) == torch.float32
    assert scoring_dtype(torch.float16, False, fp64=True) == torch.float64
    with pytest.raises(ScoreModeError, match=r"cast_logits_fp32 is False, but .* are bfloat16"):
        scoring_dtype(torch.bfloat16, False)


def test_names_of_dtypes() -> None:
    assert parse_dtype("dtype", "bfloat16") == torch.bfloat16
    assert parse_dtype("dtype", "torch.float64") == torch.float64
    assert parse_dtype("dtype", torch.float16) == torch.float16
    for wrong in ("int8", torch.int64, None):
        with pytest.raises(ScoreModeError, match="param_dtype must be one of float32"):
            parse_dtype("param_dtype", wrong)
