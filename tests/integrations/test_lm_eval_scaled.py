"""Generation tasks under scalers: what is whose parameter, and what a text consists of."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.integrations.test_lm_eval_texts import requests
from vllm.score.eig.parameters import BOUNDS, RIVAL_BOUNDS
from vllm.score.eig.registry import OPTIONS, SCALERS, SHARED, SWITCHES, register_scaler
from vllm.score.eig.types import COST, Decision, Step, Trace
from vllm.score.errors import ScoreModeError
from vllm.score.escapes import unescape
from vllm.score.integrations.lm_eval.generation import read_generation_kwargs, split_settings

EIG = "expected_information_gain_reasoning"
OWN = {*BOUNDS, *RIVAL_BOUNDS, *OPTIONS, *SWITCHES, "scale_func_name"} - set(SHARED)
# As on the command line of a run that takes what a task has, too.
ALL = {
    "until": ["Question:"],
    "do_sample": False,
    "max_gen_toks": 96,
    "repetition_penalty": 1.1,
    "scale_func_name": EIG,
    "lambda_cost": 0.03,
    "beam_size": 12,
    "mc_samples": 8,
    "sample_length": 128,
    "temperature": 0.7,
    "top_p": 0.8,
    "max_computation_time": 20,
    "debug": True,
    "strict": False,
    "candidates": "sampled",
    "answer_cue": "\\nAnswer: ",
    "answer_end": "\\n",
    "length_normalization": "tokens",
    "estimator": "mutual_information",
    "decide_at": "end",
    "thinking_n_ignore": 1,
    "max_tokens_thinking": 40,
}


def test_nothing_of_a_scaler_reaches_vllm() -> None:
    assert set(ALL) >= OWN - set(RIVAL_BOUNDS)
    ((call, rest),) = split_settings([ALL])
    assert call is not None and set(rest) == {
        "until",
        "do_sample",
        "max_gen_toks",
        "repetition_penalty",
    }
    generation = read_generation_kwargs(rest, eos="</s>", max_gen_toks=256)
    assert not OWN & set(generation.options)
    params = generation.params
    assert (params.temperature, params.top_p, params.max_tokens) == (0.0, 1.0, 96)
    assert params.repetition_penalty == 1.1 and params.stop == ["Question:", "</s>"]
    assert call.parameters["temperature"] == 0.7 and call.parameters["top_p"] == 0.8


def test_sampled_answers_have_the_scaler_s_temperature() -> None:
    ((call, rest),) = split_settings([{**ALL, "do_sample": True}])
    params = read_generation_kwargs(rest, eos=None, max_gen_toks=8).params
    assert call is not None and (params.temperature, params.top_p) == (0.7, 0.8)
    # A task's own way to ask for greedy answers says nothing of the reasoning.
    ((call, rest),) = split_settings([{"scale_func_name": EIG, "temperature": 0.0}])
    params = read_generation_kwargs(rest, eos=None, max_gen_toks=8).params
    assert call is not None and (params.temperature, call.parameters["temperature"]) == (0.0, 1.0)
    limited = read_generation_kwargs(
        {"min_tokens": 9, "until": "a", "max_tokens": 20}, eos=None, max_gen_toks=8
    ).limited(5, "b", "a")
    assert (limited.min_tokens, limited.max_tokens, limited.stop) == (5, 5, ["a", "b"])


def test_equal_settings_are_split_once(caplog: Any) -> None:
    settings = {"scale_func_name": EIG, "beam_size": 99}
    with pytest.warns(RuntimeWarning, match="beam_size is 99") as warned:
        first, other, second = split_settings([settings, {"until": ["x"]}, dict(settings)])
    assert len(warned) == caplog.text.count("beam_size is 99") == 1
    assert first[0] is second[0] is not None and other == (None, {"until": ["x"]})


def test_escapes() -> None:
    assert unescape(r"\n\nAnswer: \boxed{\\n") == "\n\nAnswer: \\boxed{\\n"


REFUSED = [
    ({"lambda_cost": 0.03}, "lambda_cost=0.03, which only scalers take; add scale_func_name"),
    ({"scale_func_name": "expected_information_gain"}, f"did you mean '{EIG}'"),
    ({"scale_func_name": EIG, "lambda_cots": 1}, "did you mean 'lambda_cost'"),
    ({"scale_func_name": EIG, "num_beams": 1}, "num_beams=1, which vLLM's SamplingParams"),
    ({"scale_func_name": EIG, "beam_size": 2.5}, "beam_size is 2.5, set a whole number"),
    ({"scale_func_name": EIG, "candidates": "bean"}, "did you mean 'beam'"),
    ({"scale_func_name": EIG, "answer_cue": " "}, "cue is ' '"),
    ({"scale_func_name": EIG, "max_tokens_thinking": "x"}, "max_tokens_thinking must be a whole"),
    ({"scale_func_name": EIG, "max_gen_toks": 2}, "max_gen_toks is 2, and .* tokens: raise"),
    ({"scale_func_name": EIG, "max_gen_toks": 2048, "sample_length": 512}, "sample_length is 512"),
    ({"scale_func_name": "fixed_budget_reasoning", "mc_samples": 3}, "mc_samples=3.*not take"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_settings_are_refused(llm: Any, options: dict[str, Any], message: str) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    short = VLLMScoreLM.from_llm(llm, max_length=512)
    before = llm.request_counter.counter
    with pytest.raises(ScoreModeError, match=message):
        short.generate_until(requests("g", [("a", {"until": [], "max_gen_toks": 64, **options})]))
    assert llm.request_counter.counter == before


class Asked:
    """What a scaler of our own was given; it writes the tokens of `reasoning`."""

    reasoning = " of the list"
    ended = False

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        llm: Any,
        questions: Sequence[list[int]],
        *,
        patience: int,
        max_tokens_thinking: int,
        think_end: Sequence[str],
        answer_cue: str = "\n\nThe answer is: ",
    ) -> list[Trace]:
        given = {"patience": patience, "room": max_tokens_thinking, "think_end": list(think_end)}
        self.calls.append({"questions": list(questions), "answer_cue": answer_cue, **given})
        ids = llm.get_tokenizer().encode(self.reasoning, add_special_tokens=False)
        stop = Step(len(ids), Decision(False, COST))
        return [
            Trace(list(q), list(ids), self.reasoning, self.ended, [stop], None) for q in questions
        ]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    from vllm.score.eig.parameters import Bound

    function = Asked()
    monkeypatch.setitem(SCALERS, "own", SCALERS[EIG])  # gone afterwards
    bounds = {"patience": Bound(int, 3, 1, 9, "steps")}
    register_scaler("own", function, bounds=bounds, replace=True)
    yield function


def written(hf: Any, ids: list[int], tokens: int, stops: Sequence[str]) -> str:
    """Hugging Face's greedy text behind token ids, up to a stop text."""
    import torch

    found = hf.model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    text = str(hf.tok_decode(found[0, len(ids) :].tolist()))
    return re.split("|".join(map(re.escape, stops)), text)[0] if stops else text


@pytest.mark.engine
def test_a_text_is_reasoning_cue_and_answer(ours: Any, hf: Any, asked: Asked) -> None:
    options = {"until": ["zz"], "max_gen_toks": 24, "scale_func_name": "own", "patience": 2}
    cue = "\nAnswer:"
    contexts = ["The value of", "Return the", "If the"]
    settings = [{**options, "answer_cue": "\\nAnswer: "}, {"until": ["e"], "max_gen_toks": 8}]
    arguments = [(contexts[i], settings[i == 1]) for i in range(3)]
    texts = ours.generate_until(requests("g", arguments), disable_tqdm=True)

    # Those without a scaler are as they ever were.
    (plain,) = ours.generate_until(requests("g", [arguments[1]]), disable_tqdm=True)
    assert texts[1] == plain and "Answer" not in plain

    (call,) = asked.calls  # equal settings side by side
    ids = [ours.tok_encode(contexts[i]) for i in (0, 2)]
    assert call["questions"] == ids and call["patience"] == 2 and call["answer_cue"] == cue + " "
    closing = ours.tok_encode(cue, add_special_tokens=False)
    left = 24 - len(closing)
    assert call["room"] == left - left // 2
    assert call["think_end"][0] == "zz"
    reasoning = ours.tok_encode(asked.reasoning, add_special_tokens=False)
    for text, context in zip((texts[0], texts[2]), ids, strict=True):
        room = left - len(reasoning)
        answer = written(hf, [*context, *reasoning, *closing], room, ["zz", "\n"])
        assert text.rstrip("\ufffd") == (asked.reasoning + cue + answer).rstrip("\ufffd")


@pytest.mark.engine
def test_a_model_that_ended_by_itself_is_left_alone(ours: Any, asked: Asked) -> None:
    asked.ended = True
    options = {"until": ["\n"], "max_gen_toks": 24, "scale_func_name": "own"}
    (text,) = ours.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
    assert text == asked.reasoning
    # A stop sequence that lies across two steps ends the text, too.
    asked.ended, options["until"] = False, ["the l"]
    (text,) = ours.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
    assert text == " of "


@pytest.mark.engine
def test_thinking_is_closed_and_left_out(llm: Any, hf: Any, asked: Asked) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    thinking = VLLMScoreLM.from_llm(llm, think_end_token="</t>")
    closing = thinking.tok_encode("</t>", add_special_tokens=False)
    reasoning = thinking.tok_encode(asked.reasoning, add_special_tokens=False)
    context = thinking.tok_encode("If the")
    options = {"until": ["e"], "max_gen_toks": 30, "scale_func_name": "own"}
    room = 30 - len(reasoning) - len(closing)
    expected = written(hf, [*context, *reasoning, *closing], room, []).lstrip().split("e")[0]
    for asked.ended in (True, False):
        (text,) = thinking.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
        assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert asked.calls[0]["think_end"] == ["</t>"]


@pytest.mark.engine
def test_scalers_of_one_s_own_are_checked(ours: Any, asked: Asked) -> None:
    def ask(**options: Any) -> list[str]:
        given = {"until": [], "max_gen_toks": 24, "scale_func_name": "own", **options}
        return ours.generate_until(requests("g", [("If the", given)]), disable_tqdm=True)

    with pytest.raises(ScoreModeError, match="'own' does not take decide_at='end'"):
        ask(decide_at="end")
    register_scaler("own", lambda llm, questions, **_: [None], replace=True)
    with pytest.raises(ScoreModeError, match=r"'own' returned \[None\]; .*Trace for each"):
        ask()


@pytest.fixture
def sent(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(tokens of the prompt, of the answer at most) of every `generate`, which still runs."""
    seen: list[tuple[int, int]] = []
    generate = llm.generate

    def noting(prompts: Any, params: Any, **options: Any) -> Any:
        pairs = zip(prompts, params, strict=True)
        seen.extend((len(p["prompt_token_ids"]), s.max_tokens) for p, s in pairs)
        return generate(prompts, params, **options)

    monkeypatch.setattr(llm, "generate", noting)
    return seen


FAST = {"beam_size": 2, "sample_length": 8, "mc_samples": 2, "answer_end": ""}


@pytest.mark.engine
@pytest.mark.parametrize("rule", [EIG, "entropy_threshold_reasoning", "fixed_budget_reasoning"])
def test_texts_are_no_longer_than_asked_for(
    ours: Any, sent: list[tuple[int, int]], rule: str, caplog: Any, capsys: Any
) -> None:
    always = {EIG: "lambda_cost", "entropy_threshold_reasoning": "entropy_threshold"}.get(rule)
    options: dict[str, Any] = {"until": [], "max_gen_toks": 32, "scale_func_name": rule, **FAST}
    options |= {always: 0} if always else {"fixed_budget": 5000}
    if rule != EIG:
        del options["mc_samples"]
    contexts = ["The value of", "If the"]
    with caplog.at_level(logging.INFO, logger="lm_eval.vllm_score"):
        texts = ours.generate_until(
            requests("g", [(c, {**options, "debug": rule == EIG}) for c in contexts]),
            disable_tqdm=True,
        )
    assert len(texts) == 2 and all(texts)
    for prompt, most in sent:
        lengths = [len(ours.tok_encode(context)) for context in contexts]
        assert most >= 1 and min(lengths) < prompt and prompt + most - max(lengths) <= 32
    assert "Decisions of this process: {'decisions': " in caplog.text
    clipped = "fixed_budget is 5000, but max_gen_toks leaves room for"
    assert (clipped in caplog.text) is (rule == "fixed_budget_reasoning")
    assert ("continue rate" in capsys.readouterr().err) is (rule == EIG)


@pytest.mark.engine
def test_a_text_as_long_as_the_model_is_clipped(
    llm: Any, sent: list[tuple[int, int]], caplog: Any
) -> None:
    """Where the ordinary way refuses; contexts are kept, but for what a step and an answer need."""
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    # No step, and hardly a token of an answer.
    options = {"until": list("aeiou "), "max_gen_toks": 32768, "scale_func_name": EIG, **FAST}
    options |= {"lambda_cost": 10}
    contexts = ["The value of the list", "of the list " * 900]
    for model, length in (
        (VLLMScoreLM.from_llm(llm), 2047),
        (VLLMScoreLM.from_llm(llm, max_length=200), 200),
    ):
        caplog.clear(), sent.clear()
        texts = model.generate_until(requests("g", [(c, options) for c in contexts]), True)
        assert [text.startswith("\n\nThe answer is:") for text in texts] == [True, True]
        short, long = sent
        assert long[0] - short[0] > length - 8 - 64 - 20
        assert sum(long) == length and sum(short) <= length
        assert caplog.text.count("max_gen_toks is 32768, as long as max_model_len") == 1
