"""Generation tasks under scalers: what is whose parameter, and what a text consists of."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import pytest
from pydantic import Field

from tests.integrations.test_lm_eval_texts import requests
from vllm.score.checks import Whole, settings
from vllm.score.eig import RULES, DecisionPoint, StoppingRule, register_scaler
from vllm.score.eig.options import unescape
from vllm.score.eig.reasoner import Continuation
from vllm.score.eig.trace import COST, GAIN, Decision, Forecast
from vllm.score.errors import ScoreModeError
from vllm.score.integrations.lm_eval.requests import read_generation_kwargs
from vllm.score.integrations.lm_eval.scaled import (
    OPTIONS,
    SHARED,
    SWITCHES,
    split_kwargs,
    split_settings,
)

EIG = "expected_information_gain_reasoning"
PARAMETERS = {name for rule in RULES.values() for name in rule.parameters()}
OWN = {*PARAMETERS, *OPTIONS, *SWITCHES, "scale_func_name"} - set(SHARED)
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
    assert set(ALL) >= OWN - {"entropy_threshold", "fixed_budget"}
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
    assert (call.rule.temperature, call.rule.top_p) == (0.7, 0.8)


def test_sampled_answers_have_the_scaler_s_temperature() -> None:
    ((call, rest),) = split_settings([{**ALL, "do_sample": True}])
    params = read_generation_kwargs(rest, eos=None, max_gen_toks=8).params
    assert call is not None and (params.temperature, params.top_p) == (0.7, 0.8)
    # A task's own way to ask for greedy answers says nothing of the reasoning.
    ((call, rest),) = split_settings([{"scale_func_name": EIG, "temperature": 0.0}])
    params = read_generation_kwargs(rest, eos=None, max_gen_toks=8).params
    assert call is not None and (params.temperature, call.rule.temperature) == (0.0, 1.0)
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


def test_options_of_lm_evals_command_line() -> None:
    from lm_eval.utils import simple_parse_args_string

    given = simple_parse_args_string(
        f"max_gen_toks=32768,scale_func_name={EIG},lambda_cost=0.03,beam_size=12,mc_samples=8,"
        "sample_length=128,debug=true,answer_end=,candidates=beam,until=stop"
    )
    before = dict(given)
    call, rest = split_kwargs(given)
    assert given == before
    assert rest == {"max_gen_toks": 32768, "until": "stop"}
    assert call is not None and call.debug
    assert call.rule == RULES[EIG](lambda_cost=0.03, beam_size=12, mc_samples=8, sample_length=128)
    assert call.options == {"answer_end": "", "candidates": "beam"}


@pytest.mark.parametrize("name", list(RULES))
def test_nothing_of_a_scaler_reaches_ordinary_generation(name: str) -> None:
    options = dict.fromkeys(OPTIONS, "x")
    known = RULES[name].parameters()
    numbers = {k: each.bounds[0] for k, each in known.items() if each.type in (int, float)}
    ordinary = {"seed": 1, "top_k": 3, "min_p": 0.1, "max_tokens": 5, "min_tokens": 1}
    switches = {"debug": "false", "strict": "True"}
    call, rest = split_kwargs(
        {"scale_func_name": name, **options, **switches, **numbers, **ordinary}
    )
    assert rest == ordinary
    assert call is not None and call.options == options and not call.debug
    assert {key: getattr(call.rule, key) for key in numbers} == numbers


@pytest.mark.parametrize("none", [{}, {"scale_func_name": None}])
def test_ordinary_options_pass_without_a_scaler(none: dict[str, Any]) -> None:
    ordinary = {"temperature": 0.0, "top_p": 0.05, "max_gen_toks": 7, "seed": 3, "do_sample": True}
    assert split_kwargs(ordinary | none) == (None, ordinary)


@pytest.mark.parametrize("key", sorted(OWN - {"scale_func_name"}))
def test_an_option_of_scalers_without_one_is_refused(key: str) -> None:
    with pytest.raises(ScoreModeError, match=rf"{key}='1'.*scale_func_name.*{EIG}"):
        split_kwargs({key: "1", "max_gen_toks": 5})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (EIG, "fixed_budget"),
        (EIG, "entropy_threshold"),
        ("entropy_threshold_reasoning", "lambda_cost"),
        ("entropy_threshold_reasoning", "fixed_budget"),
        ("entropy_threshold_reasoning", "estimator"),
        ("fixed_budget_reasoning", "mc_samples"),
    ],
)
def test_an_option_of_another_scaler_is_refused(name: str, key: str) -> None:
    with pytest.raises(ScoreModeError, match=f"{key}=1, which the scaler '{name}' does not take"):
        split_kwargs({"scale_func_name": name, key: 1})


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("lamda_cost", "lambda_cost"),
        ("mc_sample", "mc_samples"),
        ("sample_lenght", "sample_length"),
        ("answer_ends", "answer_end"),
        ("max_token_thinking", "max_tokens_thinking"),
    ],
)
def test_a_slip_is_refused(wrong: str, meant: str) -> None:
    with pytest.raises(ScoreModeError, match=f"{wrong}=1.*did you mean '{meant}'"):
        split_kwargs({"scale_func_name": EIG, wrong: 1})


@pytest.mark.parametrize("name", list(RULES))
def test_no_option_of_vllm_or_lm_eval_is_taken_for_a_slip(name: str) -> None:
    from vllm import SamplingParams

    lm_eval = ["until", "max_gen_toks", "do_sample", "max_tokens", "max_new_tokens", "max_length"]
    theirs = {*SamplingParams.__struct_fields__, *lm_eval} - {"temperature", "top_p"}
    ordinary = dict.fromkeys(sorted(theirs), True)
    _, rest = split_kwargs({"scale_func_name": name, **ordinary})
    assert rest == ordinary


@pytest.mark.parametrize("strict", [True, "true", "True"])
def test_strict_refuses_what_is_out_of_range(strict: Any) -> None:
    with pytest.raises(ScoreModeError, match="beam_size must be a whole number from 1 to 20"):
        split_kwargs({"scale_func_name": EIG, "beam_size": 99, "strict": strict})


@pytest.mark.parametrize("strict", [{}, {"strict": False}, {"strict": "false"}])
def test_otherwise_it_is_corrected(strict: dict[str, Any]) -> None:
    with pytest.warns(RuntimeWarning, match="beam_size is 99.*corrected to 20"):
        call, _ = split_kwargs({"scale_func_name": EIG, "beam_size": 99, **strict})
    assert call is not None and call.rule.beam_size == 20
    with pytest.warns(RuntimeWarning, match="fixed_budget is -1.*corrected to 0"):
        split_kwargs({"scale_func_name": "fixed_budget_reasoning", "fixed_budget": -1})


@pytest.mark.parametrize("key", ["strict", "debug"])
@pytest.mark.parametrize("value", [1, 0, "yes", "", None])
def test_a_switch_is_true_or_false(key: str, value: Any) -> None:
    with pytest.raises(ScoreModeError, match=f"{key} is {value!r}; set it to true or false"):
        split_kwargs({"scale_func_name": EIG, key: value})


def test_greedy_answers_do_not_set_the_temperature_of_the_reasoning() -> None:
    given = {"scale_func_name": EIG, "do_sample": False, "temperature": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call, rest = split_kwargs(given)
    assert call is not None and call.rule.temperature == 1.0
    assert rest == {"do_sample": False, "temperature": 0.0}
    # A temperature that somebody chose counts.
    call, rest = split_kwargs({**given, "temperature": 0.7})
    assert call is not None and call.rule.temperature == 0.7
    assert rest == {"do_sample": False}
    with pytest.warns(RuntimeWarning, match=r"temperature is 0.*corrected to 0\.1"):
        split_kwargs({"scale_func_name": EIG, "temperature": 0})


REFUSED = [
    ({"lambda_cost": 0.03}, "lambda_cost=0.03, which only scalers take; add scale_func_name"),
    ({"scale_func_name": "expected_information_gain"}, f"did you mean '{EIG}'"),
    ({"scale_func_name": EIG, "lambda_cots": 1}, "did you mean 'lambda_cost'"),
    ({"scale_func_name": EIG, "num_beams": 1}, "num_beams=1, which vLLM's SamplingParams"),
    (
        {"scale_func_name": EIG, "beam_size": 2.5},
        "beam_size must be .* from 1 to 20, got 2.5",
    ),
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


ASKED: list[DecisionPoint] = []


@settings
class Own(StoppingRule):
    """Takes one step, the tokens of " of the list"."""

    patience: Annotated[Whole, Field(ge=1, le=9, description="unused")] = 3
    ended: ClassVar[bool] = False

    async def decide(self, point: DecisionPoint) -> Decision:
        ASKED.append(point)
        if point.position:
            return Decision(False, COST)
        ids = point.meter.tokenizer.encode(REASONING, add_special_tokens=False)
        step = Continuation(ids, REASONING, self.ended)
        return Decision(True, GAIN, forecast=Forecast([step], np.zeros((1, 1)), np.zeros(1)))


REASONING = " of the list"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> type[Own]:
    monkeypatch.setitem(RULES, "own", Own)  # gone afterwards
    monkeypatch.setattr(Own, "ended", False)
    ASKED.clear()
    return register_scaler("own", Own, replace=True)


def written(hf: Any, ids: list[int], tokens: int, stops: Sequence[str]) -> str:
    """Hugging Face's greedy text behind token ids, up to a stop text."""
    import torch

    found = hf.model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    text = str(hf.tok_decode(found[0, len(ids) :].tolist()))
    return re.split("|".join(map(re.escape, stops)), text)[0] if stops else text


@pytest.mark.engine
def test_a_text_is_reasoning_cue_and_answer(ours: Any, hf: Any, own: type[Own]) -> None:
    options = {"until": ["zz"], "max_gen_toks": 24, "scale_func_name": "own", "patience": 2}
    cue = "\nAnswer:"
    contexts = ["The value of", "Return the", "If the"]
    settings = [{**options, "answer_cue": "\\nAnswer: "}, {"until": ["e"], "max_gen_toks": 8}]
    arguments = [(contexts[i], settings[i == 1]) for i in range(3)]
    texts = ours.generate_until(requests("g", arguments), disable_tqdm=True)

    # Those without a scaler are as they ever were.
    (plain,) = ours.generate_until(requests("g", [arguments[1]]), disable_tqdm=True)
    assert texts[1] == plain and "Answer" not in plain

    ids = [ours.tok_encode(contexts[i]) for i in (0, 2)]
    assert [point.state.token_ids for point in ASKED if not point.position] == ids
    for point in ASKED:
        assert point.forecaster.estimator.answer_format.cue == cue + " "
        assert point.forecaster.stop[0] == "zz"
    closing = ours.tok_encode(cue, add_special_tokens=False)
    left = 24 - len(closing)
    reasoning = ours.tok_encode(REASONING, add_special_tokens=False)
    for text, context in zip((texts[0], texts[2]), ids, strict=True):
        room = left - len(reasoning)
        answer = written(hf, [*context, *reasoning, *closing], room, ["zz", "\n"])
        assert text.rstrip("\ufffd") == (REASONING + cue + answer).rstrip("\ufffd")


@pytest.mark.engine
def test_a_model_that_ended_by_itself_is_left_alone(ours: Any, own: type[Own]) -> None:
    Own.ended = True
    options = {"until": ["\n"], "max_gen_toks": 24, "scale_func_name": "own"}
    (text,) = ours.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
    assert text == REASONING
    # A stop sequence that lies across two steps ends the text, too.
    Own.ended, options["until"] = False, ["the l"]
    (text,) = ours.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
    assert text == " of "


@pytest.mark.engine
def test_thinking_is_closed_and_left_out(llm: Any, hf: Any, own: type[Own]) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    thinking = VLLMScoreLM.from_llm(llm, think_end_token="</t>")
    closing = thinking.tok_encode("</t>", add_special_tokens=False)
    reasoning = thinking.tok_encode(REASONING, add_special_tokens=False)
    context = thinking.tok_encode("If the")
    options = {"until": ["e"], "max_gen_toks": 30, "scale_func_name": "own"}
    room = 30 - len(reasoning) - len(closing)
    expected = written(hf, [*context, *reasoning, *closing], room, []).lstrip().split("e")[0]
    for Own.ended in (True, False):
        (text,) = thinking.generate_until(requests("g", [("If the", options)]), disable_tqdm=True)
        assert text.rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert ASKED[0].forecaster.stop == ("</t>",)


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
    left = 32 - len(ours.tok_encode("\n\nThe answer is:", add_special_tokens=False))
    clipped = "5000 tokens of reasoning are asked for, but max_gen_toks leaves room for "
    assert (f"{clipped}{left - left // 2}." in caplog.text) is (rule == "fixed_budget_reasoning")
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
