"""The `tag_pref` reward, with math-verify itself: what counts as equal, and who decides it."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.processor.character_models import bigram_model, character_tokenizer
from vllm.score.errors import ScoreModeError
from vllm.score.processor import Example, SequenceProcessor
from vllm.score.processor.rewards import AnswerJudge, tag_pref
from vllm.score.processor.sequences import pad_batch


@pytest.fixture(scope="module")
def judge() -> Iterator[AnswerJudge]:
    yield AnswerJudge()


@pytest.mark.parametrize(
    "response, gold, reward",
    [
        ("so </think> <answer>7</answer>", "7", 1.0),
        ("<answer> 7.0 </answer>", "7", 1.0),
        ("<answer>1,234</answer>", "1234", 1.0),
        (r"<answer>$\frac{1}{2}$</answer>", "0.5", 1.0),
        (r"<answer>\frac{2}{4}</answer>", "1/2", 1.0),
        ("<answer>8</answer>", "7", 0.5),
        ("<answer>no number</answer>", "7", 0.5),
        ("<answer></answer>", "7", 0.5),
        ("7", "7", 0.0),
        ("<answer>7", "7", 0.0),
        ("</answer>7<answer>", "7", 0.0),
        ("<answer>7</answer><answer>7</answer>", "7", 0.0),
        ("<answer>7</answer>", None, 0.0),
    ],
)
def test_one_block_and_the_right_answer(judge, response, gold, reward):
    assert tag_pref(response, gold, judge) == reward


def test_a_failure_is_zero_and_says_why(judge, caplog):
    assert tag_pref("<answer>7</answer>", "no mathematics at all", judge) == 0.0
    assert "finds no mathematics in the gold answer" in caplog.text


def test_in_a_thread(judge):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(tag_pref("<answer>7</answer>", "7", judge))
    )
    thread.start()
    thread.join(timeout=60)
    assert found == [1.0]


def test_batches():
    tokenizer = character_tokenizer("ab")
    sp = SequenceProcessor(bigram_model(torch.zeros(3, 3)), tokenizer)
    texts = [["<answer>1</answer>", "1"], ["<answer>2</answer>", "<answer>3</answer>"]]
    batch = pad_batch([[0], [1]], [[[0], [1]], [[0], [1]]], 0, lambda ids: "")
    batch.responses_text = texts
    examples = [Example("a", "1"), Example("b", "2")]
    assert sp.compute_rewards(["a", "b"], batch, examples) == [[1.0, 0.0], [1.0, 0.5]]
    examples[0] = Example("a")
    assert sp.compute_rewards(["a", "b"], batch, examples) == [[0.0, 0.0], [1.0, 0.5]]
    assert sp.compute_rewards(["a", "b"], batch) == [[0.0, 0.0], [0.0, 0.0]]
    for prompts, known in ((["a", "b"], examples[:1]), (["a"], examples[:1]), (["a"], examples)):
        wrong = rf"examples has {len(known)} entries for {len(prompts)} prompts"
        with pytest.raises(ScoreModeError, match=wrong):
            sp.compute_rewards(prompts, batch, known)


def test_a_fork_gets_a_process_of_its_own(judge: AnswerJudge) -> None:
    """And leaves alone that of the process that it was forked from."""
    assert reward(judge, "5", "5") == 1.0
    child = os.fork()
    if not child:
        mine = reward(judge, "7", "7.0") == 1.0
        os._exit(0 if mine else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process_of(judge).poll() is None and reward(judge, "6", "6.0") == 1.0


def reward(judge: AnswerJudge, gold: str, content: str) -> float:
    return tag_pref(f"so it is </think> <answer>{content}</answer>", gold, judge)


@pytest.mark.parametrize(
    ("gold", "content", "equal"),
    [
        ("x^2+1", "1 + x^2", True),  # a formula without delimiters is read as a whole
        ("x^2+1", "1", False),
        ("1+x^2", "1", False),
        ("-3", "- 3", True),
        ("(1,2)", "$(1,2)$", True),
        ("(1,2)", "(2,1)", False),
        ("$x^2-1$", r"\boxed{(x-1)(x+1)}", True),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("1/3", "0.33", False),
        ("18", "18 dollars", True),
        ("18", "$18", True),
        ("18", "x = 18", True),
        ("72", "\n72\n", True),
        ("3", "é漢\\frac{", False),
    ],
)
def test_equality(judge: AnswerJudge, gold: str, content: str, equal: bool) -> None:
    assert reward(judge, gold, content) == (1.0 if equal else 0.5)


def test_a_power_tower_ends(judge: AnswerJudge) -> None:
    """Its digits would not fit into any memory: the comparison is given up."""
    assert reward(judge, "3", "$9^{9^{9^{9}}}$") == 0.5
    assert reward(judge, "3", "3") == 1.0


def test_every_reason_is_logged_once(judge: AnswerJudge, caplog: pytest.LogCaptureFixture) -> None:
    found = [reward(judge, "some words", "3") for _ in range(3)]
    assert found == [0.0] * 3 and caplog.text.count("some words") == 1
    reward(judge, "other words", "3")
    assert "No reward against the gold answer 'other words': math-verify finds no" in caplog.text


def test_without_a_result_in_time(caplog: pytest.LogCaptureFixture) -> None:
    judge = AnswerJudge(seconds=0.0)  # a new process takes its time
    assert reward(judge, "4.25", "4.25") == 0.0
    assert "no result of math-verify after 0 s" in caplog.text
    judge.seconds = 30.0
    assert reward(judge, "4.25", "4.25") == 1.0, "the next one has a process again"


def process_of(judge: AnswerJudge) -> Any:
    return judge._process


def test_a_process_that_died_is_started_again() -> None:
    judge = AnswerJudge()
    assert reward(judge, "5", "5") == 1.0
    process = process_of(judge)
    process.kill()
    process.wait()
    assert reward(judge, "6.5", "6.5") == 1.0


def test_the_process_ends_with_its_owner() -> None:
    judge = AnswerJudge()
    assert reward(judge, "5", "5") == 1.0
    process = process_of(judge)
    assert process.poll() is None
    del judge
    gc.collect()
    assert process.poll() is not None


def test_many_threads(judge: AnswerJudge) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: reward(judge, str(n), str(n // 2 * 2)), range(40)))
    assert found == [1.0, 0.5] * 20
