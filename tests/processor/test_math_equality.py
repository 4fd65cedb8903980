"""What counts as equal, and the process that decides it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm.score.processor import rewards as module
from vllm.score.processor.rewards import tag_pref


def reward(gold: str, content: str) -> float:
    return tag_pref(f"so it is </think> <answer>{content}</answer>", gold)


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
def test_equality(gold: str, content: str, equal: bool) -> None:
    assert reward(gold, content) == (1.0 if equal else 0.5)


def test_a_power_tower_ends() -> None:
    """Its digits would not fit into any memory: the comparison is given up."""
    assert reward("3", "$9^{9^{9^{9}}}$") == 0.5
    assert reward("3", "3") == 1.0


def test_every_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    found = [reward("some words", "3") for _ in range(3)]
    assert found == [0.0] * 3 and caplog.text.count("some words") == 1
    reward("other words", "3")
    assert "No reward against the gold answer 'other words': math-verify finds no" in caplog.text


def test_without_a_result_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module._judge.stop()  # a new process takes its time
    with monkeypatch.context() as patch:
        patch.setattr(module, "SECONDS", 0.0)
        assert reward("4.25", "4.25") == 0.0
    assert "no result of math-verify after 0 s" in caplog.text
    assert reward("4.25", "4.25") == 1.0, "the next one has a process again"


def test_a_process_that_died_is_started_again() -> None:
    assert reward("5", "5") == 1.0
    process = module._judge._process
    assert process is not None
    process.kill()
    process.wait()
    assert reward("6.5", "6.5") == 1.0


def test_many_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: reward(str(n), str(n // 2 * 2)), range(40)))
    assert found == [1.0, 0.5] * 20
