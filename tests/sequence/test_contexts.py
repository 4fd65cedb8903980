"""Contexts: texts as they are, messages through a chat template."""

from __future__ import annotations

from typing import Any

import pytest

from tests.sequence.tokenizers import WithoutOffsets
from vllm.score import ScoreModeError
from vllm.score.sequence.contexts import read_context
from vllm.score.tiny.tokenizer import train_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('No system message') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};[assistant]{% endif %}"
)
USER = {"role": "user", "content": "hé"}
BEGUN = {"role": "assistant", "content": "It is "}


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer([TEMPLATE], 300)
    made.chat_template = TEMPLATE
    return made


class Chatting(WithoutOffsets):
    """A tokenizer of vLLM's own kind; one that reads its template differently, if so asked."""

    def __init__(self, inner: Any, *, shift: int = 0) -> None:
        super().__init__(inner)
        self.shift = shift

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **options: Any) -> Any:
        given = self.inner.apply_chat_template(messages, tokenize=tokenize, **options)
        return [token + self.shift for token in given] if tokenize else given


def test_a_text_is_taken_as_it_is(tokenizer):
    context = read_context(" a <|bos|> ", tokenizer, "it")
    assert (context.text, context.templated) == (" a <|bos|> ", False)


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Chatting])
def test_messages_end_where_the_answer_begins(wrap, tokenizer):
    context = read_context([USER], wrap(tokenizer), "it")
    assert (context.text, context.templated) == ("<|bos|>[user]hé;[assistant]", True)
    assert context.given == [USER]
    more = read_context((USER, BEGUN, USER), wrap(tokenizer), "it")
    assert more.text == "<|bos|>[user]hé;[assistant]It is ;[user]hé;[assistant]"


def test_a_begun_answer_is_continued(tokenizer):
    assert read_context([USER, BEGUN], tokenizer, "it").text == "<|bos|>[user]hé;[assistant]It is "


def test_templates_that_do_not_serve_are_refused(tokenizer):
    system = {"role": "system", "content": "x"}
    with pytest.raises(ScoreModeError, match=r"^it: the chat template .*No system message; give a"):
        read_context([system, USER], tokenizer, "it")
    with pytest.raises(ScoreModeError, match="its text, tokenised, is not the template's tokens"):
        read_context([USER], Chatting(tokenizer, shift=1), "it")
    with pytest.raises(ScoreModeError, match=r"^it\[0\] is {'content': 'x'}; give a message"):
        read_context([{"content": "x"}], tokenizer, "it")
