"""The checks of `GenerationConfig`, and the values that every backend shares."""

from __future__ import annotations

import numpy as np
import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import GenerationConfig


def test_the_documented_defaults():
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
        ("top_p", 0.0, r"\(0, 1\], got 0.0"),
        ("top_p", 1.01, r"\(0, 1\], got 1.01"),
        ("top_p", True, r"\(0, 1\]"),
        ("max_new_tokens", 0, "at least 1, got 0"),
        ("tf_batch_size", 2.5, "whole number"),
        ("num_return_sequences", True, "whole number"),
        ("do_sample", 1, "True or False, got 1"),
    ],
)
def test_a_bad_value_is_refused_whenever_it_is_set(field, value, message):
    with pytest.raises(ScoreModeError, match=message):
        GenerationConfig(**{field: value})
    config = GenerationConfig()
    with pytest.raises(ScoreModeError, match=message):
        setattr(config, field, value)
    assert getattr(config, field) == getattr(GenerationConfig(), field)


def test_an_unknown_field_is_refused():
    config = GenerationConfig()
    with pytest.raises(ScoreModeError, match="did you mean 'temperature'"):
        config.temprature = 0.5


def test_only_what_was_computed_is_changed():
    values = StepValues(np.zeros(2), np.ones(2), rb_entropy=np.full(2, 3.0))
    doubled = values.map(lambda v: 2 * v)
    assert doubled.logq.tolist() == [2.0, 2.0]
    assert doubled.rb_entropy.tolist() == [6.0, 6.0]
    assert doubled.head_mass is None
