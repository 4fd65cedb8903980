"""What needs no engine: the options, generation parameters, truncation, merged requests."""

from __future__ import annotations

from typing import Any

import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.arguments import SEED, read_arguments
from vllm.score.integrations.lm_eval.generation import read_generation_kwargs
from vllm.score.integrations.lm_eval.truncation import fit_context, fit_pairs


def test_options_of_lm_eval_s_vllm_model_are_sorted() -> None:
    found = read_arguments(
        "M",
        {
            "dtype": "float32",
            "max_length": 512,
            "batch_size": "auto:4",
            "max_batch_size": 8,
            "device": "cuda:0",
            "swap_space": 4,
            "lora_local_path": "adapter",
            "gpu_memory_utilization": 0.5,
            "revision": None,
            "max_gen_toks": 7,
            "chat_template_args": '{"mode": "short"}',
        },
    )
    assert found.engine == {
        "model": "M",
        "seed": SEED,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "dtype": "float32",
        "gpu_memory_utilization": 0.5,
        "enable_lora": True,
    }
    assert (found.max_gen_toks, found.batch_size) == (7, "auto:4")
    assert found.chat_template_args == {"mode": "short"}
    request = found.lora_request()
    assert request is not None and request.lora_path == "adapter"


REFUSED: list[tuple[str | None, dict[str, Any], bool, str]] = [
    (None, {}, False, "no model is named: --model_args pretrained="),
    ("M", {"max_length": 4, "max_model_len": 8}, False, "max_model_len=8 and max_length=4"),
    ("M", {"max_model_len": 0}, False, "max_model_len is 0; .*at least 1"),
    ("M", {"truncation_side": "top"}, False, "truncation_side is 'top'; .*left, right, middle"),
    ("M", {"enable_thinking": True}, False, "without think_end_token"),
    ("M", {"chat_template_args": "{"}, False, "chat_template_args is '{', no JSON"),
    ("M", {"chat_template_args": "[1]"}, False, "give a dict"),
    (None, {"dtype": "float32"}, True, "dtype: .*engine, which runs already"),
]


@pytest.mark.parametrize(("model", "options", "runs", "message"), REFUSED)
def test_options_are_refused(
    model: str | None, options: dict[str, Any], runs: bool, message: str
) -> None:
    with pytest.raises(ScoreModeError, match=message):
        read_arguments(model, options, engine_runs=runs)


def test_several_replicas_are_refused() -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    with pytest.raises(ScoreModeError, match=r"data_parallel_size is 2: .*local-completions"):
        VLLMScoreLM("nowhere", data_parallel_size=2)


@pytest.mark.parametrize(
    ("given_", "temperature", "stop", "length"),
    [
        ({}, 0.0, ["</s>"], 256),
        ({"until": "x", "max_gen_toks": 5}, 0.0, ["x", "</s>"], 5),
        ({"until": ["x", ""], "stop": ["y"], "max_tokens": 5}, 0.0, ["x", "y", "</s>"], 5),
        ({"temperature": 0.7}, 0.7, ["</s>"], 256),
        ({"temperature": 0.7, "do_sample": False}, 0.0, ["</s>"], 256),
        ({"do_sample": True, "top_p": 0.5}, 1.0, ["</s>"], 256),
    ],
)
def test_generation_parameters(
    given_: dict[str, Any], temperature: float, stop: list[str], length: int
) -> None:
    found = read_generation_kwargs(given_, eos="</s>", max_gen_toks=256)
    assert (found.params.temperature, found.params.stop) == (temperature, stop)
    assert (found.params.max_tokens, found.max_gen_toks, found.until) == (length, length, stop)
    assert found.params.top_p == given_.get("top_p", 1.0)


@pytest.mark.parametrize("key", ["scale_func_name", "num_beams", "score_mode", "n", "tempratur"])
def test_generation_parameters_that_vllm_lacks_are_refused(key: str) -> None:
    with pytest.raises(ScoreModeError, match=f"of the task 'T' has {key}=2"):
        read_generation_kwargs({key: 2}, eos=None, max_gen_toks=8, task="T")
    with pytest.raises(ScoreModeError, match="Did you mean 'temperature'"):
        read_generation_kwargs({"tempratur": 1}, eos=None, max_gen_toks=8)


def test_truncation_keeps_the_end() -> None:
    pairs = [([1, 2, 3, 4], [5, 6]), ([1], [2])]
    assert fit_pairs(pairs, 5) == pairs  # the last token is not read
    assert fit_pairs(pairs, 2) == [([4], [5, 6]), ([1], [2])]
    with pytest.raises(ScoreModeError, match=r"2 tokens, more than .* max_model_len=1"):
        fit_pairs(pairs, 1)
    ids = list(range(7))
    assert fit_context(ids, 7, "left") == ids
    assert fit_context(ids, 3, "left") == [4, 5, 6]
    assert fit_context(ids, 3, "right") == [0, 1, 2]
    assert fit_context(ids, 3, "middle") == [0, 5, 6]
