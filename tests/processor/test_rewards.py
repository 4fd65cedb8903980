"""The `tag_pref` reward, with math-verify itself."""

from __future__ import annotations

import threading

import pytest

from vllm.score.errors import ScoreModeError
from vllm.score.processor.rewards import rewards, tag_pref


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
def test_one_block_and_the_right_answer(response, gold, reward):
    assert tag_pref(response, gold) == reward


def test_a_failure_is_zero_and_says_why(caplog):
    assert tag_pref("<answer>7</answer>", "no mathematics at all") == 0.0
    assert "finds no mathematics in the gold answer" in caplog.text


def test_in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(tag_pref("<answer>7</answer>", "7")))
    thread.start()
    thread.join(timeout=60)
    assert found == [1.0]


def test_batches():
    responses = [["<answer>1</answer>", "1"], ["<answer>2</answer>", "<answer>3</answer>"]]
    assert rewards(responses, ["1", "2"]) == [[1.0, 0.0], [1.0, 0.5]]
    assert rewards(responses, [None, "2"]) == [[0.0, 0.0], [1.0, 0.5]]
    assert rewards(responses, None) == [[0.0, 0.0], [0.0, 0.0]]
    with pytest.raises(ScoreModeError, match="golds has 1 entries for 2 prompts"):
        rewards(responses, ["1"])
