"""max_model_len for requests that read as many tokens as the model can; no engine is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm.score.engine.configuration import with_room_for_one_more

LIMIT = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 2.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": LIMIT,
}


def same(config: Any) -> Any:
    return config


def test_one_more_than_asked_for_or_than_the_model_has(model_dir: Callable[..., Path]) -> None:
    model = {"model": str(model_dir("gpt2", max_position_embeddings=LIMIT))}
    beyond = {"max_model_len": LIMIT + 1, "hf_overrides": {"model_max_length": LIMIT + 1}}
    assert with_room_for_one_more({**model, "max_model_len": 33}) == {**model, "max_model_len": 34}
    assert with_room_for_one_more(model) == {**model, **beyond}
    assert with_room_for_one_more({**model, "max_model_len": LIMIT}) == {**model, **beyond}
    with pytest.raises(ValueError, match=r"max_model_len \(65\) is greater"):
        with_room_for_one_more({**model, "max_model_len": LIMIT + 1})


def test_settings_that_cannot_take_one_more_stay(model_dir: Callable[..., Path]) -> None:
    model = {"model": str(model_dir("gpt2", max_position_embeddings=LIMIT))}
    whole = {"max_model_len": 33, "max_num_batched_tokens": 33, "enable_chunked_prefill": False}
    for settings in (whole, {"hf_overrides": same}):
        assert with_room_for_one_more({**model, **settings}) == {**model, **settings}


def test_longrope_keeps_its_short_factors(model_dir: Callable[..., Path]) -> None:
    folder = model_dir(
        "llama",
        max_position_embeddings=2 * LIMIT,
        config_overrides={"rope_parameters": LONGROPE},
    )
    for length, expected in ((LIMIT - 1, LIMIT), (LIMIT, LIMIT), (LIMIT + 1, LIMIT + 2)):
        settings = {"model": str(folder), "max_model_len": length}
        assert with_room_for_one_more(settings)["max_model_len"] == expected
