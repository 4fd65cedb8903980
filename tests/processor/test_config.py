"""The configuration of a processor: its fields, how it is read, and the dtypes it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import pytest
import torch

from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import (
    GenerationConfig,
    Precision,
    Profile,
    read_config,
    read_dtype,
    read_profile,
)
from vllm.score.processor.head import autocast_to


def test_the_documented_dict() -> None:
    given = {
        "generation": {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64, "tf_batch_size": 3},
        "precision": {
            "func_override": {"autocast": False, "dtype": "float64", "cast_params": False},
            "tf_nograd": {"dtype": "bfloat16"},
            "tf_withgrad": {"autocast": True, "dtype": "bfloat16"},
            "allow_tf32": True,
            "matmul_precision": "medium",
            "entropy_fp64": True,
        },
    }
    config, precision = read_config(MappingProxyType(given))
    assert config == GenerationConfig(0.7, 0.9, max_new_tokens=64, tf_batch_size=3)
    assert precision == Precision(
        func_override={"autocast": False, "dtype": "float64", "cast_params": False},
        tf_nograd={"autocast": False, "dtype": "bfloat16", "cast_logits_fp32": True},
        tf_withgrad={"autocast": True, "dtype": "bfloat16", "cast_logits_fp32": True},
        allow_tf32=True,
        matmul_precision="medium",
        entropy_fp64=True,
    )
    precision.tf_nograd["dtype"] = "float64"
    assert given["precision"]["tf_nograd"] == {"dtype": "bfloat16"}  # type: ignore[index]


def test_defaults() -> None:
    expected = {"autocast": False, "dtype": "float32"}
    for given in (None, {}, {"generation": {}}, GenerationConfig()):
        config, precision = read_config(given)
        assert config == GenerationConfig()
        assert precision.func_override == {**expected, "cast_params": True}
        assert precision.tf_nograd == {**expected, "cast_logits_fp32": True}
        assert precision.tf_withgrad == {**expected, "cast_logits_fp32": True}
        assert precision.allow_tf32 is False
        assert precision.matmul_precision == "high"
        assert precision.entropy_fp64 is False


def test_a_generation_config_is_kept_itself() -> None:
    mine = GenerationConfig(top_p=0.5)
    assert read_config(mine)[0] is mine


def test_two_processors_do_not_share_profiles() -> None:
    first, second = read_config(None)[1], read_config(None)[1]
    first.tf_nograd["dtype"] = "float64"
    assert second.tf_nograd["dtype"] == "float32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "config must be a dict, got 3; fields: generation, precision"),
        ({"generations": {}}, "config: field 'generations' is unknown .did you mean 'generation'"),
        (
            {"generation": {"topp": 0.5}},
            "field 'topp' is unknown .did you mean 'top_p'",
        ),
        (
            {"generation": {"top_p": 1.5}},
            "top_p must be a number above 0 .* 1, got 1.5",
        ),
        ({"generation": None}, "config.'generation'. must be a dict"),
        ({"precision": {"tf_no_grad": {}}}, "'tf_no_grad' is unknown .did you mean 'tf_nograd'"),
        (
            {"precision": {"tf_nograd": {"cast_params": True}}},
            "tf_nograd: field 'cast_params'",
        ),
        ({"precision": {"tf_nograd": {"dtype": "float23"}}}, "did you mean 'float32'"),
        ({"precision": {"tf_nograd": {"dtype": 32}}}, "dtype'. '32' is unknown"),
        ({"precision": {"tf_nograd": {"autocast": 1}}}, "'autocast'. must be True or False"),
        (
            {"precision": {"tf_nograd": {"autocast": True, "dtype": "bfloat16"}}},
            "always runs with autocast off",
        ),
        ({"precision": {"func_override": {"autocast": True}}}, "func_override.*autocast off"),
        (
            {"precision": {"tf_withgrad": {"autocast": True}}},
            "autocast to float32: set .* or float16",
        ),
        (
            {"precision": {"matmul_precision": "hi"}},
            "matmul_precision must be one of .*'hi'",
        ),
        ({"precision": {"entropy_fp64": "yes"}}, "entropy_fp64 must be True or False"),
        ({"precision": {"allow_tf32": 0}}, "allow_tf32 must be True or False, got 0"),
    ],
)
def test_errors(given: object, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        read_config(given)  # type: ignore[arg-type]


def test_a_changed_profile_is_checked_when_it_is_used() -> None:
    profile = read_config(None)[1].tf_withgrad
    profile.update(autocast=True, dtype=torch.float16)
    assert read_profile("tf_withgrad", profile) == Profile(torch.float16, torch.float16, True)
    profile["dtypes"] = "float32"
    with pytest.raises(ScoreModeError, match="tf_withgrad: field 'dtypes' is unknown"):
        read_profile("tf_withgrad", profile)


def test_the_documented_defaults() -> None:
    assert vars(GenerationConfig()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 200,
        "do_sample": True,
        "num_return_sequences": 8,
        "gen_batch_size": 32,
        "tf_batch_size": 8,
        "rb_requires_grad": False,
    }


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("temperature", 0, "do_sample=False"),
        ("temperature", float("nan"), "above 0"),
        ("temperature", "1", "above 0"),
        ("top_p", 0.0, "above 0 and of at most 1, got 0.0; 1 samples"),
        ("top_p", 1.01, "of at most 1, got 1.01"),
        ("top_p", True, "at most 1, got True"),
        ("max_new_tokens", 0, "at least 1, got 0"),
        ("tf_batch_size", 2.5, "whole number"),
        ("num_return_sequences", True, "whole number"),
        ("do_sample", 1, "True or False, got 1"),
    ],
)
def test_a_bad_value_is_refused_whenever_it_is_set(field: str, value: object, message: str) -> None:
    with pytest.raises(ScoreModeError, match=message):
        GenerationConfig(**{field: value})  # type: ignore[arg-type]
    config = GenerationConfig()
    with pytest.raises(ScoreModeError, match=message):
        setattr(config, field, value)
    assert getattr(config, field) == getattr(GenerationConfig(), field)


def test_an_unknown_field_is_refused() -> None:
    config = GenerationConfig()
    with pytest.raises(ScoreModeError, match="did you mean 'temperature'"):
        config.temprature = 0.5


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
    Precision(allow_tf32=allow_tf32, matmul_precision=asked).apply_to_process()  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == expected
    assert torch.backends.cudnn.allow_tf32 is allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is (expected != "highest")


def test_autocast_is_what_is_asked_whatever_surrounds_it() -> None:
    x, cpu = torch.ones(2, 2), torch.device("cpu")
    with autocast_to(torch.bfloat16, cpu):
        assert (x @ x).dtype == torch.bfloat16
        with autocast_to(None, cpu):
            assert (x @ x).dtype == torch.float32


def test_names_of_dtypes() -> None:
    assert read_dtype("dtype", "bfloat16") == torch.bfloat16
    assert read_dtype("dtype", "torch.float64") == torch.float64
    assert read_dtype("dtype", torch.float16) == torch.float16
    for wrong in ("int8", torch.int64, None):
        with pytest.raises(ScoreModeError, match=r"param_dtype .* is unknown.*; there are float32"):
            read_dtype("param_dtype", wrong)
