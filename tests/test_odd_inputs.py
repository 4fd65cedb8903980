"""Whatever a public function is given, it uses, or refuses in a sentence that names the field."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vllm.score import ScoreModeError, score

pytestmark = pytest.mark.engine

PROMPT = [3, 4, 5, 6]
# As [3, 4, 5, 6]; generators are made anew for each use.
SAME_IDS: dict[str, Callable[[], Any]] = {
    "tuple": lambda: tuple(PROMPT),
    "range": lambda: range(3, 7),
    "array": lambda: np.array(PROMPT),
    "uint8": lambda: np.array(PROMPT, dtype=np.uint8),
    "objects": lambda: np.array(PROMPT, dtype=object),
    "tensor": lambda: torch.tensor(PROMPT),
    "scalars": lambda: [np.int64(3), np.int32(4), torch.tensor(5), 6],
}
NO_IDS: dict[str, Any] = {
    "none": None,
    "number": 5,
    "text": "ab",
    "bytes": b"ab",
    "set": {1, 2},
    "nested": [[[0, 1, 2]]],
    "truth values": [True, False],
    "one truth value": [5, True],
    "NumPy's": [5, np.True_],
    "array of them": np.array([True, False]),
    "tensor of them": torch.tensor([True, False]),
    "list of tensors": [torch.tensor(True), torch.tensor(False)],
    "floats": [1.0, 2.0],
    "array of floats": np.array([1.0, 2.0]),
    "tensor of floats": torch.tensor([1.0, 2.0]),
    "texts": [5, "6"],
    "nones": [None],
    "ragged": [5, [6]],
    "NaN": [float("nan")],
    "huge": [2**80],
    "no vector": torch.tensor(5),
}


def stock_params() -> Any:
    from vllm import SamplingParams

    return SamplingParams(score_mode=True, prompt_logprobs=0)


def generate(llm: Any, ids: Any, **more: Any) -> np.ndarray:
    prompt = {"prompt_token_ids": ids, **more}
    scores = llm.generate([prompt], stock_params(), use_tqdm=False)[0].scores
    found: np.ndarray = scores.logprobs
    return found


def score_one(llm: Any, ids: Any, **more: Any) -> np.ndarray:
    (found,) = score(llm, [{"prompt_token_ids": ids, **more}], use_tqdm=False)
    return found.logprobs


@pytest.mark.parametrize("call", [score_one, generate])
@pytest.mark.parametrize("kind", SAME_IDS)
def test_token_ids_of_any_kind(llm: Any, kind: str, call: Any) -> None:
    want = score_one(llm, PROMPT)
    ids = SAME_IDS[kind]()
    np.testing.assert_allclose(call(llm, ids), want, atol=1e-6)
    targets = SAME_IDS[kind]()[1:]
    np.testing.assert_allclose(call(llm, PROMPT, target_token_ids=targets), want, atol=1e-6)
    rows = [[t] for t in SAME_IDS[kind]()[1:]]
    found = call(llm, PROMPT, target_token_ids=rows)
    np.testing.assert_allclose(found, want[:, None], atol=1e-6)


@pytest.mark.parametrize("call", [score_one, generate])
@pytest.mark.parametrize("kind", NO_IDS)
def test_what_is_no_token_id(llm: Any, kind: str, call: Any) -> None:
    given = NO_IDS[kind]
    # vLLM asks for the length of a prompt before score mode sees it.
    if call is score_one or (hasattr(given, "__len__") and kind != "no vector"):
        with pytest.raises(ScoreModeError, match="prompt_token_ids"):
            call(llm, given)
    if given is not None:
        with pytest.raises(ScoreModeError, match="target_token_ids"):
            call(llm, PROMPT, target_token_ids=given)
    assert not llm.llm_engine.has_unfinished_requests()


def test_the_place_of_what_is_wrong(llm: Any) -> None:
    for given, message in (
        ([[[0, 1, 2]]], "requests[0]: prompt_token_ids must be integers, got [0, 1, 2] at [0]"),
        ([[5, True]], "requests[0]: prompt_token_ids must be integers, got True at [1]"),
        ([[5], [5, 2.5]], "requests[1]: prompt_token_ids must be integers, got 2.5 at [1]"),
        ([5, 6], "requests[0]: prompt_token_ids must be a list of token ids, got int"),
    ):
        with pytest.raises(ScoreModeError, match=re.escape(message)):
            score(llm, given, use_tqdm=False)


def test_requests_may_come_one_by_one(llm: Any) -> None:
    want = [scores.logprobs for scores in score(llm, [PROMPT, PROMPT[:2]], use_tqdm=False)]
    found = score(llm, (ids for ids in (PROMPT, PROMPT[:2])), use_tqdm=False)
    for scores, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-6)
    assert len(score(llm, torch.tensor([PROMPT, PROMPT]), use_tqdm=False)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 5}, "requests must be a list, got one int"),
        ({"requests": None}, "requests must be a list, got one NoneType"),
        ({"llm": None}, "llm is a NoneType; give a vllm.LLM"),
        ({"llm": "model"}, "llm is a str; give a vllm.LLM"),
        ({"statistics": "entropy"}, "write ['entropy']"),
        ({"statistics": 5}, "score_statistics must be a list of names, got 5"),
        ({"top": None}, "top must be a whole number of at least 0, got None"),
        ({"top": "2"}, "top must be a whole number of at least 0, got '2'"),
        ({"top": 2.5}, "top must be a whole number of at least 0, got 2.5"),
        ({"top": True}, "top must be a whole number of at least 0, got True"),
        ({"temperature": True}, "score_temperature must be a number above 0, got True"),
        ({"temperature": "1"}, "score_temperature must be a number above 0, got '1'"),
        ({"top_p": True}, "score_top_p must be a number above 0 and of at most 1, got True"),
        ({"lora_request": "adapter"}, "lora_request"),
    ],
    ids=str,
)
def test_options_of_score(llm: Any, options: dict[str, Any], message: str) -> None:
    given = {"llm": llm, "requests": [PROMPT], "use_tqdm": False, **options}
    with pytest.raises(ScoreModeError, match=re.escape(message)):
        score(**given)


def test_options_that_are_left_open(llm: Any) -> None:
    options = {"statistics": None, "skip_prefix_cache": None, "reproducible": None}
    assert len(score(llm, [PROMPT], use_tqdm=None, **options)[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_mode": "no"}, "score_mode must be True or False, got 'no'"),
        (
            {"prompt_logprobs": "3"},
            "prompt_logprobs must be a whole number of at least -1",
        ),
        (
            {"prompt_logprobs": 2.5},
            "prompt_logprobs must be a whole number of at least -1",
        ),
        ({"score_statistics": 5}, "score_statistics must be a list of names, got 5"),
    ],
    ids=str,
)
def test_sampling_parameters(options: dict[str, Any], message: str) -> None:
    from vllm import SamplingParams

    with pytest.raises(ScoreModeError, match=message):
        SamplingParams(**{"score_mode": True, **options})


SOURCES = {k: v for k, v in NO_IDS.items() if k not in ("text", "nested")}


@pytest.mark.parametrize("kind", SOURCES)
def test_perplexity(llm: Any, kind: str) -> None:
    from vllm.score.perplexity import perplexity

    with pytest.raises(ScoreModeError, match="source"):
        perplexity(llm, SOURCES[kind], context_length=64, stride=32, use_tqdm=False)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"conventions": 5}, "conventions"),
        ({"conventions": [5]}, "conventions"),
        ({"store": 5}, "store"),
    ],
    ids=str,
)
def test_options_of_perplexity(llm: Any, options: dict[str, Any], field: str) -> None:
    from vllm.score.perplexity import perplexity

    given = {"context_length": 64, "stride": 32, "use_tqdm": False, **options}
    with pytest.raises(ScoreModeError, match=field):
        perplexity(llm, "a text", **given)
    with pytest.raises(ScoreModeError, match="llm is a NoneType"):
        perplexity(None, "a text", **given)


NO_TEXTS = {
    "none": None,
    "number": 5,
    "text": "ab",
    "bytes": b"ab",
    "set": {"a"},
    "numbers": [5, 6],
    "nones": [None],
    "list of bytes": [b"ab"],
    "paths": [Path("x")],
    "lists": [[5.5]],
    "lone surrogate": ["a\ud800"],
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_sequence_probability(llm: Any, kind: str) -> None:
    from vllm.score.sequence import SequenceProbVLLMHook

    hook, given = SequenceProbVLLMHook(llm), NO_TEXTS[kind]
    with pytest.raises(ScoreModeError, match="contexts"):
        hook.get_log_prob(given, [" x"])
    with pytest.raises(ScoreModeError, match="target_sequences"):
        hook.get_log_prob(["a"], given)
    with pytest.raises(ScoreModeError, match="pairs"):
        hook.get_log_prob_of_pairs(given)
    with pytest.raises(ScoreModeError, match="llm is a str"):
        SequenceProbVLLMHook("model")  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["vllm", "hf"])
def processor(request: Any, llm: Any, model_dir: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm.score.processor import SequenceProcessor

    config = {"generation": {"max_new_tokens": 2, "num_return_sequences": 1}}
    if request.param == "vllm":
        return SequenceProcessor(llm=llm, config=config)
    folder = str(model_dir("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    return SequenceProcessor(model, AutoTokenizer.from_pretrained(folder), config=config)


@pytest.mark.parametrize("kind", NO_IDS)
def test_prompts_of_the_processor(processor: Any, kind: str) -> None:
    with pytest.raises(ScoreModeError, match="prompts"):
        processor.generate_batched([NO_IDS[kind]] if kind != "text" else "text")


def test_prompts_of_the_processor_that_are_used(processor: Any) -> None:
    for kind, make in SAME_IDS.items():
        batch = processor.generate_batched(ids for ids in [make()])
        assert batch.sequences[0, 0, :4].tolist() == PROMPT, kind
    for seed in ("x", 1.5, -1, True):
        with pytest.raises(ScoreModeError, match="seed"):
            processor.generate_batched([PROMPT], seed=seed)


def test_sequences_of_the_processor(processor: Any) -> None:
    good = processor.generate_batched([PROMPT], G=2)
    ids, masks = good.sequences, good.attention_masks
    odd: dict[str, list[Any]] = {
        "sequences": [None, ids.tolist(), ids.numpy(), ids.float(), ids.bool()],
        "attention_masks": [None, masks.tolist()],
        "prompt_lens": [None, 4, ["4"], [4.0], [True]],
        "gen_lens": [None, 2, [["2", "2"]], [[2.0, 2.0]], [[None, None]]],
    }
    for field, values in odd.items():
        for value in values:
            broken = dataclasses.replace(good, **{field: value})
            with pytest.raises(ScoreModeError, match=field):
                processor.teacher_force_logprobs(broken)
    for broken in (None, 5, ids):
        with pytest.raises(ScoreModeError, match="BatchedSequences"):
            processor.teacher_force_logprobs(broken)
    for field in ("params_override", "buffers_override"):
        with pytest.raises(ScoreModeError, match=field):
            processor.teacher_force_logprobs(good, **{field: 5})
    with pytest.raises(ScoreModeError, match="examples"):
        processor.generate_with_logprobs(["x"], examples=5)
    with pytest.raises(ScoreModeError, match="dataset_options"):
        processor.generate_with_logprobs(dataset_name="local_file", dataset_options=5)


@pytest.mark.parametrize("kind", [k for k in NO_IDS if k != "text"])
def test_questions_of_reasoning(llm: Any, kind: str) -> None:
    from vllm.score.eig import expected_information_gain_reasoning

    with pytest.raises(ScoreModeError, match=r"questions\[0\]"):
        expected_information_gain_reasoning(llm, [NO_IDS[kind]], candidates=["a", "b"])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"think_end": 5}, "think_end"),
        ({"think_end": [5]}, "think_end"),
        ({"seed": None}, "seed"),
        ({"seed": -1}, "seed"),
        ({"metrics": 5}, "metrics"),
        ({"prompts": 5}, "prompts"),
        ({"llm": None}, "llm is a NoneType"),
    ],
    ids=str,
)
def test_options_of_reasoning(llm: Any, options: dict[str, Any], field: str) -> None:
    from vllm.score.eig import expected_information_gain_reasoning

    given = {"llm": llm, "questions": ["a"], "candidates": ["a", "b"], **options}
    with pytest.raises(ScoreModeError, match=field):
        expected_information_gain_reasoning(**given)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("loglikelihood", ("a", None), "a text is None"),
        ("loglikelihood", (5, "b"), "a text is 5"),
        ("loglikelihood", ("a",), "no .context, continuation."),
        ("loglikelihood", ("a\ud800", "b"), "lone surrogate"),
        ("loglikelihood_rolling", (b"a",), "a text is b'a'"),
        ("generate_until", (5, {}), "a text is 5"),
        ("generate_until", ("a", None), "gen_kwargs is None"),
        ("generate_until", ("a", {"until": [5]}), r"until must be a list, .* got \[5\]"),
    ],
    ids=str,
)
def test_requests_of_lm_eval(llm: Any, method: str, arguments: Any, message: str) -> None:
    from lm_eval.api.instance import Instance

    from vllm.score.integrations.lm_eval import VLLMScoreLM

    model = VLLMScoreLM.from_llm(llm)
    request = Instance(method, {}, arguments, 0)  # type: ignore[arg-type]
    with pytest.raises(ScoreModeError, match=message):
        getattr(model, method)([request], disable_tqdm=True)
    with pytest.raises(ScoreModeError, match="requests must be a list of lm_eval"):
        getattr(model, method)([arguments])


def test_options_of_the_lm_eval_model(llm: Any) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    for field, value in (("prefix_token_id", "x"), ("max_length", "x"), ("max_gen_toks", "x")):
        with pytest.raises(ScoreModeError, match=f"{field} must be a whole number.*'x'"):
            VLLMScoreLM.from_llm(llm, **{field: value})
    with pytest.raises(ScoreModeError, match="llm is a str"):
        VLLMScoreLM.from_llm("model")
