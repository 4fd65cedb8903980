"""Characters of tokens made visible."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm.score.report.characters import PART, visible, visible_token


@given(st.text())
def test_nothing_breaks_the_line_and_nothing_is_lost(text):
    shown = visible(text)
    assert shown.isprintable()
    assert len(shown) >= len(text)
    assert [char for char in text if char.isprintable()] == [
        char for char in text if char.isprintable() and char in shown
    ]


def test_spaces_of_a_token_are_marked():
    assert visible_token(" a\n", 7) == "␣a↵"
    assert visible(" a\n") == " a↵"


def test_what_a_font_lacks_is_escaped():
    assert visible("a漢😀", drawable=str.isascii) == "a\\u6f22\\U0001f600"


def test_tokens_without_characters_of_their_own():
    assert visible_token("", 7) == PART
    assert visible_token(None, 7) == "[7]"
