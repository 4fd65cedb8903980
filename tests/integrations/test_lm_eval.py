"""The same tasks through lm-eval's `hf`, its `vllm` and our model: the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.tasks import LAST_WORD, LETTERS, LONG, OPTIONS, ROLLING, SENTENCES, WRITING

pytestmark = pytest.mark.engine

ALL = [LETTERS, LONG, LAST_WORD, ROLLING, WRITING]
TEMPLATE = (
    "<|bos|>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered, by document."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


def assert_same(found: dict[str, Any], expected: dict[str, Any], tasks: list[str]) -> None:
    """Answers within 1e-4 nats, greedy flags and texts equal, and so all metrics."""
    for task in tasks:
        pairs = list(zip(responses(found, task), responses(expected, task), strict=True))
        assert pairs
        for (answer,), (other,) in pairs:
            if task == WRITING:
                assert answer == other
            elif task == ROLLING:
                assert answer == pytest.approx(other, rel=1e-6)
            else:
                assert answer[0] == pytest.approx(other[0], abs=1e-4)
                assert answer[1] == other[1]
        assert found["results"][task].keys() == expected["results"][task].keys()
        for name, value in expected["results"][task].items():
            if isinstance(value, float) and not math.isnan(value):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-5), name


@pytest.fixture(scope="module")
def results(ours: Any, hf: Any, evaluate: Callable[..., Any]) -> tuple[Any, Any]:
    """Ours and lm-eval's `hf`, two examples before each question."""
    return evaluate(ours, ALL, num_fewshot=2), evaluate(hf, ALL, num_fewshot=2)


def test_all_tasks_equal_hugging_face(results: tuple[Any, Any]) -> None:
    assert_same(*results, ALL)


def test_the_tasks_tell_models_apart(results: tuple[Any, Any], ours: Any) -> None:
    """Greedy and other answers, one-token and long options: else equality says little."""
    found, _ = results
    greedy = {answer[1] for (answer,) in responses(found, LAST_WORD)}
    assert greedy == {True, False}
    assert {len(ours.tok_encode(f" {option}")) for option in OPTIONS} == {1}
    assert len({answer for (answer,) in responses(found, WRITING)}) > 1


def test_without_examples_too(ours: Any, hf: Any, evaluate: Callable[..., Any]) -> None:
    names = [LETTERS, LAST_WORD]
    assert_same(evaluate(ours, names), evaluate(hf, names), names)


def test_chat_template(ours: Any, hf: Any, evaluate: Callable[..., Any]) -> None:
    names = [LETTERS, WRITING]
    options = {
        "num_fewshot": 1,
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": "Answer in a word.",
    }
    try:
        for model in (ours, hf):
            model.tokenizer.chat_template = TEMPLATE
            assert model.chat_template(True) == TEMPLATE
        found, expected = (evaluate(model, names, **options) for model in (ours, hf))
    finally:
        for model in (ours, hf):
            model.tokenizer.chat_template = None
    assert_same(found, expected, names)
    context, _ = found["samples"][LETTERS][0]["arguments"][0]
    assert context.startswith("<|bos|>system: Answer in a word.\nuser:")
    assert ours.tok_encode(context).count(ours.tokenizer.bos_token_id) == 1


def test_all_tasks_equal_lm_eval_s_vllm(
    results: tuple[Any, Any], stock_vllm: Any, evaluate: Callable[..., Any]
) -> None:
    assert_same(results[0], evaluate(stock_vllm, ALL, num_fewshot=2), ALL)


def test_long_texts_are_cut_or_windowed_alike(
    llm: Any, make_hf: Callable[..., Any], evaluate: Callable[..., Any], caplog: Any
) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    ours, hf = VLLMScoreLM.from_llm(llm, max_length=60), make_hf(max_length=60)
    names = [LETTERS, LONG, ROLLING]
    found, expected = (evaluate(model, names, num_fewshot=3) for model in (ours, hf))
    assert_same(found, expected, names)
    assert "are longer than max_model_len=60" in caplog.text
    texts = [s["arguments"][0][0] for s in found["samples"][ROLLING]]
    assert max(len(ours.tok_encode(text)) for text in texts) > 3 * 60


def test_a_cache_of_answers(
    llm: Any, hf: Any, evaluate: Callable[..., Any], tmp_path: Path, results: tuple[Any, Any]
) -> None:
    from vllm.score.integrations.lm_eval import VLLMScoreLM

    options = {"num_fewshot": 2, "use_cache": str(tmp_path / "answers")}
    first = evaluate(VLLMScoreLM.from_llm(llm), ALL, **options)
    sent = llm.request_counter.counter
    again = evaluate(VLLMScoreLM.from_llm(llm), ALL, **options)
    assert llm.request_counter.counter == sent
    for task in ALL:
        assert responses(again, task) == responses(first, task)
    assert_same(again, results[1], ALL)


def test_one_token_options_are_one_request(
    llm: Any, ours: Any, evaluate: Callable[..., Any]
) -> None:
    before = llm.request_counter.counter
    found = evaluate(ours, [LETTERS])
    documents = len(found["samples"][LETTERS])
    assert documents == len(SENTENCES)
    assert llm.request_counter.counter - before == documents


def test_what_is_written_beside_the_results(results: tuple[Any, Any]) -> None:
    config = results[0]["config"]
    assert config["model_dtype"] == "torch.float32"
    assert config["versions"]["torch"]
    assert results[0]["max_length"] == 2047  # an engine of 2048 reads no more
    assert results[0]["eot_token_id"] == results[1]["eot_token_id"]
