"""Which options go to a scaler, which to ordinary generation, and which nowhere."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm.score.eig import registry
from vllm.score.eig.parameters import Bound
from vllm.score.eig.registry import SCALERS, register_scaler, scaler, split_kwargs
from vllm.score.errors import ScoreModeError

EIG = "expected_information_gain_reasoning"
SEVEN = {
    "lambda_cost": 0.05,
    "beam_size": 8,
    "mc_samples": 5,
    "sample_length": 64,
    "temperature": 1.0,
    "top_p": 0.9,
    "max_computation_time": 30.0,
}
OPTIONS = [
    "candidates",
    "answer_cue",
    "answer_end",
    "length_normalization",
    "estimator",
    "decide_at",
    "thinking_n_ignore",
    "max_tokens_thinking",
]


@pytest.fixture
def own_scalers() -> Iterator[None]:
    before = dict(SCALERS)
    yield
    SCALERS.clear()
    SCALERS.update(before)


def test_the_built_in_ones():
    assert sorted(SCALERS) == [
        "entropy_threshold_reasoning",
        EIG,
        "fixed_budget_reasoning",
    ]
    assert scaler(EIG).parameters == tuple(SEVEN)
    assert "entropy_threshold" in scaler("entropy_threshold_reasoning").parameters
    assert "fixed_budget" in scaler("fixed_budget_reasoning").parameters
    for each in SCALERS.values():
        assert tuple(each.bounds) == each.parameters


@pytest.mark.parametrize("name", ["entropy_threshold_reasoning", EIG, "fixed_budget_reasoning"])
def test_the_built_in_ones_can_be_loaded(name):
    assert scaler(name).load().__name__ == name


def test_options_of_lm_evals_command_line():
    parse = pytest.importorskip("lm_eval.utils").simple_parse_args_string
    given = parse(
        f"max_gen_toks=32768,scale_func_name={EIG},lambda_cost=0.03,beam_size=12,mc_samples=8,"
        "sample_length=128,debug=true,answer_end=,candidates=beam,until=stop"
    )
    before = dict(given)
    call, rest = split_kwargs(given)
    assert given == before
    assert rest == {"max_gen_toks": 32768, "until": "stop"}
    assert call is not None and call.scaler is SCALERS[EIG]
    assert call.parameters == SEVEN | {
        "lambda_cost": 0.03,
        "beam_size": 12,
        "mc_samples": 8,
        "sample_length": 128,
    }
    assert call.options == {"debug": True, "answer_end": "", "candidates": "beam"}


@pytest.mark.parametrize("name", list(SCALERS))
def test_nothing_of_a_scaler_reaches_ordinary_generation(name):
    options = dict.fromkeys(OPTIONS, "x") | {"debug": "false", "strict": "True"}
    numbers = {key: bound.low for key, bound in scaler(name).bounds.items()}
    ordinary = {"seed": 1, "top_k": 3, "min_p": 0.1, "max_tokens": 5, "min_tokens": 1}
    call, rest = split_kwargs({"scale_func_name": name, **options, **numbers, **ordinary})
    assert rest == ordinary
    assert call is not None
    assert call.parameters == numbers
    assert call.options == dict.fromkeys(OPTIONS, "x") | {"debug": False}


@pytest.mark.parametrize("none", [{}, {"scale_func_name": None}])
def test_ordinary_options_pass_without_a_scaler(none):
    ordinary = {"temperature": 0.0, "top_p": 0.05, "max_gen_toks": 7, "seed": 3, "do_sample": True}
    assert split_kwargs(ordinary | none) == (None, ordinary)


@pytest.mark.parametrize(
    "key",
    [
        *(key for key in SEVEN if key not in ("temperature", "top_p")),
        *OPTIONS,
        *("strict", "debug", "entropy_threshold", "fixed_budget"),
    ],
)
def test_an_option_of_scalers_without_one_is_refused(key):
    with pytest.raises(ScoreModeError, match=rf"{key}='1'.*scale_func_name.*{EIG}"):
        split_kwargs({key: "1", "max_gen_toks": 5})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (EIG, "fixed_budget"),
        (EIG, "entropy_threshold"),
        ("entropy_threshold_reasoning", "lambda_cost"),
        ("entropy_threshold_reasoning", "fixed_budget"),
        ("fixed_budget_reasoning", "mc_samples"),
    ],
)
def test_an_option_of_another_scaler_is_refused(name, key):
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
def test_a_slip_is_refused(wrong, meant):
    with pytest.raises(ScoreModeError, match=f"{wrong}=1.*did you mean '{meant}'"):
        split_kwargs({"scale_func_name": EIG, wrong: 1})


@pytest.mark.parametrize("name", list(SCALERS))
def test_no_option_of_vllm_or_lm_eval_is_taken_for_a_slip(name):
    from vllm import SamplingParams

    lm_eval = ["until", "max_gen_toks", "do_sample", "max_tokens", "max_new_tokens", "max_length"]
    theirs = {*SamplingParams.__struct_fields__, *lm_eval} - {"temperature", "top_p"}
    ordinary = dict.fromkeys(sorted(theirs), True)
    _, rest = split_kwargs({"scale_func_name": name, **ordinary})
    assert rest == ordinary


@pytest.mark.parametrize("wrong", ["expected_information_gain", "fixed_budget", "", 3, "xyz"])
def test_an_unknown_scaler_is_refused(wrong):
    with pytest.raises(ScoreModeError) as refused:
        split_kwargs({"scale_func_name": wrong})
    assert f"scale_func_name is {wrong!r}" in str(refused.value)
    nearest = {"fixed_budget": "fixed_budget_reasoning", "expected_information_gain": EIG}
    if wrong in nearest:
        assert f"did you mean {nearest[wrong]!r}?" in str(refused.value)
    else:
        assert EIG in str(refused.value)


@pytest.mark.parametrize("strict", [True, "true", "True"])
def test_strict_refuses_what_is_out_of_range(strict):
    with pytest.raises(ScoreModeError, match="beam_size is 99, out of range"):
        split_kwargs({"scale_func_name": EIG, "beam_size": 99, "strict": strict})


@pytest.mark.parametrize("strict", [{}, {"strict": False}, {"strict": "false"}])
def test_otherwise_it_is_corrected(strict):
    with pytest.warns(RuntimeWarning, match="beam_size is 99.*corrected to 20"):
        call, _ = split_kwargs({"scale_func_name": EIG, "beam_size": 99, **strict})
    assert call is not None and call.parameters["beam_size"] == 20
    with pytest.warns(RuntimeWarning, match="fixed_budget is -1.*corrected to 0"):
        call, _ = split_kwargs({"scale_func_name": "fixed_budget_reasoning", "fixed_budget": -1})
    assert call is not None and call.parameters["fixed_budget"] == 0


@pytest.mark.parametrize("key", ["strict", "debug"])
@pytest.mark.parametrize("value", [1, 0, "yes", "", None])
def test_a_switch_is_true_or_false(key, value):
    with pytest.raises(ScoreModeError, match=f"{key} is {value!r}; set it to true or false"):
        split_kwargs({"scale_func_name": EIG, key: value})


def test_greedy_answers_do_not_set_the_temperature_of_the_reasoning():
    given = {"scale_func_name": EIG, "do_sample": False, "temperature": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call, rest = split_kwargs(given)
    assert call is not None and call.parameters["temperature"] == 1.0
    assert rest == {"do_sample": False, "temperature": 0.0}
    # A temperature that somebody chose counts.
    call, rest = split_kwargs({**given, "temperature": 0.7})
    assert call is not None and call.parameters["temperature"] == 0.7
    assert rest == {"do_sample": False}
    with pytest.warns(RuntimeWarning, match=r"temperature is 0.*corrected to 0\.1"):
        split_kwargs({"scale_func_name": EIG, "temperature": 0})


def test_a_scaler_is_imported_when_it_is_needed(own_scalers, tmp_path: Path, monkeypatch):
    (tmp_path / "scaler_of_a_user.py").write_text("def rule(text):\n    return text * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    bounds = {"patience": Bound(int, 2, 1, 9, "steps")}
    made = register_scaler("patient", "scaler_of_a_user:rule", ["top_p"], bounds)
    call, rest = split_kwargs({"scale_func_name": "patient", "patience": "3", "seed": 1})
    assert call is not None and call.scaler is made and rest == {"seed": 1}
    assert call.parameters == {"top_p": 0.9, "patience": 3}
    assert "scaler_of_a_user" not in sys.modules
    assert made.load()("ab") == "abab"
    assert "scaler_of_a_user" in sys.modules


def test_a_callable_is_a_scaler(own_scalers):
    def rule() -> int:
        return 5

    assert register_scaler("mine", rule).load() is rule
    with pytest.raises(ScoreModeError, match="'mine' is registered already"):
        register_scaler("mine", rule)
    assert register_scaler("mine", len, replace=True).load() is len


@pytest.mark.parametrize("function", ["no_module_of_mine:rule", "json:no_function", "json:__doc__"])
def test_what_cannot_be_loaded_says_so(own_scalers, function):
    register_scaler("broken", function)
    with pytest.raises(ScoreModeError, match=f"'broken' is registered as '{function}'"):
        scaler("broken").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("json",), "module:function"),
        ((":dumps",), "module:function"),
        ((3,), "module:function"),
        (("json:dumps", ["patience"]), "no bounds for patience"),
        (("json:dumps", ["debug"]), "debug like options"),
        (("json:dumps", [], {"candidates": Bound(int, 2, 1, 9, "x")}), "candidates like options"),
    ],
)
def test_what_cannot_be_a_scaler_is_refused(own_scalers, arguments, message):
    with pytest.raises(ScoreModeError, match=message):
        register_scaler("wrong", *arguments)
    assert "wrong" not in SCALERS


def test_the_module_names_what_it_takes():
    assert set(registry.OPTIONS) == set(OPTIONS)
