"""The special tokens in front of a text stand there once, however the text comes in."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vllm.score.tiny.tokenizer as tiny
from tests.perplexity.texts import ODD, PROSE, byte_level, byte_level_with_bos
from vllm.score.cli.questions import Questions
from vllm.score.eig.problems import _token_ids
from vllm.score.errors import ScoreModeError
from vllm.score.processor.sequences import prompt_ids
from vllm.score.sequence.boundary import BoundaryTokenizer, Pair
from vllm.score.tokens import automatic_prefix, encode_texts, prefix_once

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


def ways(tokenizer: Any, text: str) -> dict[str, list[int]]:
    """The ids of a text, by every way in that needs no engine."""
    ids = tokenizer(text)["input_ids"]
    ((encoded, _),) = encode_texts(tokenizer, [text])
    return {
        "score": encoded,
        "LLM.generate": prefix_once(tokenizer, text, ids).ids,
        "SequenceProcessor": prompt_ids([text], tokenizer, len(tokenizer))[0],
        "EIG": _token_ids(text, tokenizer, "questions[0]", len(tokenizer)),
        "vllm-score eig": Questions([text], ["question"], [None]).token_ids(tokenizer)[0],
    }


@pytest.mark.parametrize("text", ["hello there", f"{BOS}hello there", f"{BOS}{BOS}hello", BOS])
def test_bos_stands_in_front_once_or_as_often_as_the_text_says(text: str) -> None:
    tokenizer = byte_level_with_bos()
    plain = tokenizer.encode(text, add_special_tokens=False)
    expected = plain if text.startswith(BOS) else [0, *plain]
    found = ways(tokenizer, text)
    assert found == dict.fromkeys(found, expected)
    assert [t.own_prefix for t in encode_texts(tokenizer, [text])] == [text.startswith(BOS)]


@pytest.mark.parametrize("text", ["", "hello", f"{BOS}hello", f"{BOS}{BOS}hello"])
def test_a_tokenizer_that_adds_nothing(text: str) -> None:
    tokenizer = byte_level()
    assert automatic_prefix(tokenizer) == []
    assert encode_texts(tokenizer, [text]) == [(tokenizer.encode(text), False)]


@pytest.mark.parametrize("own", ["<|bos|><|sop|>", "<|bos|>"])
def test_of_two_tokens_in_front_the_first_decides(own: str) -> None:
    tokenizer = two_in_front()
    plain = tokenizer.encode(f"{own}hello", add_special_tokens=False)
    assert encode_texts(tokenizer, [f"{own}hello"]) == [([*plain, 1], True)]
    assert encode_texts(tokenizer, ["hello"])[0].ids == tokenizer.encode("hello")


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
        ("texts[1]", lambda t: encode_texts(t, ["a", "a\ud800"])),
        ("prompts[1]", lambda t: prompt_ids([[5], "a\ud800"], t, len(t))),
        ("questions[0]", lambda t: _token_ids("a\ud800", t, "questions[0]", len(t))),
    ],
)
def test_a_lone_surrogate_is_refused_by_name(name: str, encode: Any) -> None:
    with pytest.raises(ScoreModeError, match="lone surrogate") as error:
        encode(byte_level())
    assert str(error.value).startswith(name)
