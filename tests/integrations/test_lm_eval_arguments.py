"""What needs no engine: the options, generation parameters, truncation, merged requests."""

from __future__ import annotations

from typing import Any

import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.engine import (
    SEED,
    engine_options,
    length_asked_for,
    lora_request,
)
from vllm.score.integrations.lm_eval.requests import fit_context, fit_pairs, read_generation_kwargs


def test_options_of_lm_eval_s_vllm_model_are_sorted() -> None:
    given = {"dtype": "float32", "device": "cuda:0", "swap_space": 4, "revision": None}
    ours = {"model": "M", "max_model_len": None}
    assert engine_options(ours, given) == {"model": "M", "seed": SEED, "dtype": "float32"}
    ours = {"model": "M", "max_model_len": 512, "max_num_seqs": 8, "enable_lora": True}
    assert engine_options(ours, {"seed": 5}) == {**ours, "seed": 5}
    request = lora_request("adapter")
    assert request is not None and request.lora_path == "adapter"
    assert lora_request(None) is None


def test_digits_in_a_text_are_a_number() -> None:
    assert length_asked_for("512", None) == length_asked_for(None, 512) == 512
    with pytest.raises(ScoreModeError, match="max_length must be a whole number of at least 1"):
        length_asked_for(None, "many")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": None}, "no model is named: --model_args pretrained="),
        ({"max_length": 4, "max_model_len": 8}, "max_model_len=8 and max_length=4"),
        ({"max_model_len": 0}, "max_model_len must be a whole number of at least 1.*, got 0"),
        ({"truncation_side": "top"}, "truncation_side 'top' is unknown.* left, right, middle"),
        ({"enable_thinking": True}, "without think_end_token"),
        ({"chat_template_args": "{"}, "chat_template_args must be a dict or None, got '{'; give"),
        ({"chat_template_args": "[1]"}, "give a dict"),
    ],
    ids=str,
)
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    with pytest.raises(ScoreModeError, match=message):
        VLLMScoreLM(**{"pretrained": "nowhere", **options})


@pytest.mark.engine
def test_an_engine_that_runs_takes_its_options_no_more(llm: Any) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    options = {"batch_size": "auto:4", "max_batch_size": 8, "chat_template_args": '{"end": "!"}'}
    model = VLLMScoreLM.from_llm(llm, max_gen_toks="7", enable_thinking=False, **options)
    assert (model.max_gen_toks, model.batch_size) == (7, "auto:4")
    model.tokenizer.chat_template = "{{ messages[0].content }}{{ end }}{{ enable_thinking }}"
    assert model.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!False"
    with pytest.raises(ScoreModeError, match=r"dtype: .*engine, which runs already"):
        VLLMScoreLM.from_llm(llm, dtype="float32", revision=None)


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
    with pytest.raises(ScoreModeError, match="did you mean 'temperature'"):
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
