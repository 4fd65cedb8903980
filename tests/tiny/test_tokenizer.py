"""The byte-level BPE: lossless, of the size asked for, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.corpus import BOS_TOKEN, EOS_TOKEN, MINIMUM_VOCABULARY, train_tokenizer

TEXTS = ["Return the value of the key.\n", "Raise an error; the message says why.\n"] * 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert len(ids) <= len(text.encode())


def test_size_and_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 300
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS_TOKEN, EOS_TOKEN)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert 0 not in tokenizer.encode("Return")  # no BOS by itself
    assert tokenizer.encode(BOS_TOKEN + "Return")[0] == 0


def test_merges_are_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    bytes_only = train_tokenizer([], MINIMUM_VOCABULARY)
    assert len(bytes_only.encode(TEXTS[0])) == len(TEXTS[0].encode())
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_training_twice_and_loading_give_the_same(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    again = train_tokenizer(reversed(TEXTS), 300)
    tokenizer.save_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    files = [(tmp_path / side / "tokenizer.json").read_bytes() for side in "ab"]
    assert files[0] == files[1]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "Réturn  the\tvalue 🙂\n\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ScoreModeError, match=r"vocab_size must be .*at least 258, got 257"):
        train_tokenizer(TEXTS, 257)
