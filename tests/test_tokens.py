"""From texts, messages and ids to token ids: the special tokens in front stand there once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vllm.score.tiny.corpus as tiny
from tests.perplexity.texts import ODD, PROSE, byte_level, byte_level_with_bos
from tests.sequence.tokenizers import WithoutOffsets
from vllm.score.cli.inputs import Questions
from vllm.score.eig import EIGParameters, eig_problems
from vllm.score.errors import ScoreModeError
from vllm.score.processor.sequences import prompt_ids
from vllm.score.sequence import BoundaryTokenizer
from vllm.score.sequence.encoding import Pair
from vllm.score.tokens import automatic_prefix, encode_inputs, prefix_once, render_messages

BOS = tiny.BOS_TOKEN


@cache
def two_in_front() -> Any:
    """A tokenizer that puts two special tokens in front, as ChatGLM's does, and one behind."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.train_tokenizer([PROSE[:20_000]], 600)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|sop|>"]})
    sop = tokenizer.convert_tokens_to_ids("<|sop|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> <|sop|> $A <|eos|>",
        special_tokens=[("<|bos|>", 0), ("<|sop|>", sop), ("<|eos|>", 1)],
    )
    return tokenizer


def question_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids with which reasoning about a question begins."""
    vocab_size = len(tokenizer)
    (problem,) = eig_problems(tokenizer, [text], EIGParameters(), vocab_size=vocab_size)
    return problem.args[0].args[0]


def ways(tokenizer: Any, text: str) -> dict[str, list[int]]:
    """The ids of a text, by every way in that needs no engine."""
    ids = tokenizer(text)["input_ids"]
    ((encoded, _),) = encode_inputs(tokenizer, [text])
    return {
        "score": encoded,
        "LLM.generate": prefix_once(tokenizer, text, ids).ids,
        "SequenceProcessor": prompt_ids([text], tokenizer, len(tokenizer))[0],
        "EIG": question_ids(text, tokenizer),
        "vllm-score eig": Questions([text], ["question"], [None]).token_ids(tokenizer)[0],
    }


@pytest.mark.parametrize("text", ["hello there", f"{BOS}hello there", f"{BOS}{BOS}hello", BOS])
def test_bos_stands_in_front_once_or_as_often_as_the_text_says(text: str) -> None:
    tokenizer = byte_level_with_bos()
    plain = tokenizer.encode(text, add_special_tokens=False)
    expected = plain if text.startswith(BOS) else [0, *plain]
    found = ways(tokenizer, text)
    assert found == dict.fromkeys(found, expected)
    assert [t.own_prefix for t in encode_inputs(tokenizer, [text])] == [text.startswith(BOS)]


@pytest.mark.parametrize("text", ["", "hello", f"{BOS}hello", f"{BOS}{BOS}hello"])
def test_a_tokenizer_that_adds_nothing(text: str) -> None:
    tokenizer = byte_level()
    assert automatic_prefix(tokenizer) == []
    assert encode_inputs(tokenizer, [text]) == [(tokenizer.encode(text), False)]


@pytest.mark.parametrize("own", ["<|bos|><|sop|>", "<|bos|>"])
def test_of_two_tokens_in_front_the_first_decides(own: str) -> None:
    tokenizer = two_in_front()
    plain = tokenizer.encode(f"{own}hello", add_special_tokens=False)
    assert encode_inputs(tokenizer, [f"{own}hello"]) == [([*plain, 1], True)]
    assert encode_inputs(tokenizer, ["hello"])[0].ids == tokenizer.encode("hello")


@given(st.lists(st.sampled_from([BOS, "a", " the", "é", "\n", ODD]), max_size=8))
def test_a_text_that_was_tokenised_without_special_tokens_stays(parts: list[str]) -> None:
    tokenizer, text = byte_level_with_bos(), "".join(parts)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert prefix_once(tokenizer, text, ids).ids == ids


def test_the_context_of_a_sequence_brings_its_own() -> None:
    tokenizer = byte_level_with_bos()
    pairs = [Pair("hello", " there"), Pair(f"{BOS}hello", " there")]
    plain, own = BoundaryTokenizer(tokenizer).split(pairs)
    assert own == plain and own.token_ids.count(0) == 1


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("texts[1]", lambda t: encode_inputs(t, ["a", "a\ud800"])),
        ("prompts[1]", lambda t: prompt_ids([[5], "a\ud800"], t, len(t))),
        ("questions[0]", lambda t: question_ids("a\ud800", t)),
    ],
)
def test_a_lone_surrogate_is_refused_by_name(name: str, encode: Any) -> None:
    with pytest.raises(ScoreModeError, match="lone surrogate") as error:
        encode(byte_level())
    assert str(error.value).startswith(name)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('No system message') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }}{% if not loop.last %};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %};[assistant]{% endif %}"
)
USER = {"role": "user", "content": "hé"}
BEGUN = {"role": "assistant", "content": "It is "}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made: Any = tiny.train_tokenizer([TEMPLATE], 300)
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
def test_messages_end_where_the_answer_begins(wrap: Any, tokenizer: Any) -> None:
    text = render_messages([USER], wrap(tokenizer), "it")
    assert text == "<|bos|>[user]hé;[assistant]"
    more = render_messages((USER, BEGUN, USER), wrap(tokenizer), "it")
    assert more == "<|bos|>[user]hé;[assistant]It is ;[user]hé;[assistant]"


def test_a_begun_answer_is_continued(tokenizer: Any) -> None:
    assert render_messages([USER, BEGUN], tokenizer, "it") == "<|bos|>[user]hé;[assistant]It is "


def test_templates_that_do_not_serve_are_refused(tokenizer: Any) -> None:
    system = {"role": "system", "content": "x"}
    with pytest.raises(ScoreModeError, match=r"^it: the chat template .*No system message; give a"):
        render_messages([system, USER], tokenizer, "it")
    with pytest.raises(ScoreModeError, match="its text, tokenised, is not the template's tokens"):
        render_messages([USER], Chatting(tokenizer, shift=1), "it")
    with pytest.raises(ScoreModeError, match=r"^it\[0\] is {'content': 'x'}; give a message"):
        render_messages([{"content": "x"}], tokenizer, "it")


def test_texts_messages_and_ids_in_any_mixture(tokenizer: Any) -> None:
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
