"""Reading the configuration of a processor."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from vllm.score.errors import ScoreModeError
from vllm.score.processor.settings import Precision, Profile, read_config, read_profile
from vllm.score.processor.types import GenerationConfig


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
        (3, "config must be a dict with some of generation, precision, got 3"),
        ({"generations": {}}, "config has no field 'generations' .did you mean 'generation'"),
        ({"generation": {"topp": 0.5}}, "has no field 'topp' .did you mean 'top_p'"),
        ({"generation": {"top_p": 1.5}}, "top_p must be in .0, 1., got 1.5"),
        ({"generation": None}, "config.'generation'. must be a dict"),
        ({"precision": {"tf_no_grad": {}}}, "'tf_no_grad' .did you mean 'tf_nograd'"),
        ({"precision": {"tf_nograd": {"cast_params": True}}}, "tf_nograd has no field"),
        ({"precision": {"tf_nograd": {"dtype": "float23"}}}, "did you mean 'float32'"),
        ({"precision": {"tf_nograd": {"dtype": 32}}}, "dtype'. must be one of .*, got 32"),
        ({"precision": {"tf_nograd": {"autocast": 1}}}, "'autocast'. must be True or False"),
        (
            {"precision": {"tf_nograd": {"autocast": True, "dtype": "bfloat16"}}},
            "always runs with autocast off",
        ),
        ({"precision": {"func_override": {"autocast": True}}}, "func_override.*autocast off"),
        ({"precision": {"tf_withgrad": {"autocast": True}}}, "autocast to float32.*not exist"),
        ({"precision": {"matmul_precision": "hi"}}, "matmul_precision must be one of .*'hi'"),
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
    assert read_profile("tf_withgrad", profile) == Profile(True, torch.float16, True)
    profile["dtypes"] = "float32"
    with pytest.raises(ScoreModeError, match="tf_withgrad has no field 'dtypes'"):
        read_profile("tf_withgrad", profile)
