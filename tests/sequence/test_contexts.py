"""Texts, messages through a chat template, and token ids: to token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.sequence.tokenizers import WithoutOffsets
from vllm.score import ScoreModeError
from vllm.score.tiny.tokenizer import train_tokenizer
from vllm.score.tokens import encode_inputs, render_messages

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


@pytest.mark.parametrize("wrap", [lambda tokenizer: tokenizer, Chatting])
def test_messages_end_where_the_answer_begins(wrap, tokenizer):
    text = render_messages([USER], wrap(tokenizer), "it")
    assert text == "<|bos|>[user]hé;[assistant]"
    more = render_messages((USER, BEGUN, USER), wrap(tokenizer), "it")
    assert more == "<|bos|>[user]hé;[assistant]It is ;[user]hé;[assistant]"


def test_a_begun_answer_is_continued(tokenizer):
    assert render_messages([USER, BEGUN], tokenizer, "it") == "<|bos|>[user]hé;[assistant]It is "


def test_templates_that_do_not_serve_are_refused(tokenizer):
    system = {"role": "system", "content": "x"}
    with pytest.raises(ScoreModeError, match=r"^it: the chat template .*No system message; give a"):
        render_messages([system, USER], tokenizer, "it")
    with pytest.raises(ScoreModeError, match="its text, tokenised, is not the template's tokens"):
        render_messages([USER], Chatting(tokenizer, shift=1), "it")
    with pytest.raises(ScoreModeError, match=r"^it\[0\] is {'content': 'x'}; give a message"):
        render_messages([{"content": "x"}], tokenizer, "it")


def test_texts_messages_and_ids_in_any_mixture(tokenizer):
    plain = tokenizer.encode("hé", add_special_tokens=False)
    chat = tokenizer.encode("<|bos|>[user]hé;[assistant]", add_special_tokens=False)
    inputs = [[USER], "hé", [5, 6], np.array([7]), "<|bos|>hé"]
    found = encode_inputs(tokenizer, inputs, list("abcde"), vocab_size=8)
    assert [tokens.ids for tokens in found] == [chat, plain, [5, 6], [7], [0, *plain]]
    assert encode_inputs(tokenizer, []) == []
    with pytest.raises(ScoreModeError, match=r"^it\[1\] is 8, outside the vocabulary 0\.\.7"):
        encode_inputs(tokenizer, [[5, 8]], ["it"], vocab_size=8)
    with pytest.raises(ScoreModeError, match=r"^it\[0\] is 5; give a message"):  # no ids asked for
        encode_inputs(tokenizer, [[5, 8]], ["it"])
    for wrong, message in ((3, "it is int"), ([], "it has no messages"), (USER, "it is one mess")):
        with pytest.raises(ScoreModeError, match=f"^{message}"):
            encode_inputs(tokenizer, [wrong], ["it"], vocab_size=8)
