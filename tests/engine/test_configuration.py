"""max_model_len for requests that read as many tokens as the model can, no engine is started; and
models that leave out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm.score.engine.configuration import unread_rows_problem, with_room_for_one_more
from vllm.score.errors import ScoreModeUnavailable

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


@pytest.mark.engine
def test_rows_that_deepseek_leaves_out_are_refused(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With vLLM's own classes; the model itself needs several GPUs."""
    from vllm.models.deepseek_v41.decoder_replay_layers import DecoderReplayLayers
    from vllm.models.deepseek_v41.nvidia.model_state import DeepseekV41ModelState
    from vllm.score import score

    class ReadsTargets(DeepseekV41ModelState):
        """As vLLM 0.33.0's."""

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            if new_req_data.sampling_params.prompt_logprob_token_ids is None:
                super().add_request(req_index, new_req_data)

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert unread_rows_problem(worker) is None
    for kind, replays, refused in (
        (DeepseekV41ModelState, True, True),
        (DeepseekV41ModelState, False, False),
        (ReadsTargets, True, False),
    ):
        state = kind.__new__(kind)
        layers = DecoderReplayLayers(128, lambda *_: (), lambda *_: None, set(), "")
        state.decoder_replay_layers = layers if replays else None
        monkeypatch.setattr(worker.model_runner, "model_state", state, raising=False)
        assert (unread_rows_problem(worker) is not None) is refused
        monkeypatch.setattr(llm.llm_engine, "score_mode_checked", False, raising=False)
        if refused:
            with pytest.raises(ScoreModeUnavailable, match="--no-swa-bounded-replay"):
                score(llm, [[5, 6, 7]], use_tqdm=False)
        else:
            assert len(score(llm, [[5, 6, 7]], use_tqdm=False)[0]) == 2
