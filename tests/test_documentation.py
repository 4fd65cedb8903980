"""The documents say what the code does."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_amended_modules_are_those_of_the_register():
    from tests.support.patch_table import markdown

    text = (ROOT / "SCORE_MODE_IMPLEMENTATION.md").read_text()
    assert markdown() in text, "run `python -m tests.support.patch_table` and paste its output"
    assert text.count("\n### `vllm.") == markdown().count("### `vllm.")


def test_refused_options_are_listed():
    from vllm.score.engine.request import REFUSED_OPTIONS

    text = (ROOT / "SCORE_MODE_IMPLEMENTATION.md").read_text()
    for field, _, _ in REFUSED_OPTIONS:
        if field not in ("n", "prompt_logprob_start"):
            assert f"`{field}`" in text


def test_statistics_are_listed():
    from vllm.score.ops import statistics

    text = (ROOT / "SCORE_MODE_IMPLEMENTATION.md").read_text()
    for name in statistics.STATISTICS:
        assert f"`{name}`" in text
        assert f"``{name}``" in (statistics.__doc__ or "")
