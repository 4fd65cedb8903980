"""Where responses end, on text and on generation with models that write the tag."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.perplexity.texts import byte_level, other_tokenizers
from tests.processor.character_models import EOS, bigram_model, chain_logits, character_tokenizer
from tests.processor.teacher_forced import generate
from vllm.score.processor.config import GenerationConfig
from vllm.score.processor.sequences import (
    TAG,
    TAIL,
    after_answer,
    eos_token_ids,
    response_length,
)

CHARACTERS = "x<answer/>yz"


def characters() -> Any:
    return character_tokenizer("".join(dict.fromkeys(CHARACTERS)))


def brute_force_length(ids: list[int], tokenizer: Any, eos: set[int]) -> int:
    """Token by token, as the definition says."""
    for n in range(1, len(ids) + 1):
        if TAG in tokenizer.decode(ids[:n], skip_special_tokens=True) or ids[n - 1] in eos:
            return n
    return len(ids)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 0),
        ("xyz", 3),
        ("x</answer>", 10),
        ("x</answer>yz", 10),
        ("</answer></answer>", 9),
        ("x" + EOS, 2),
        ("x" + EOS + "yz", 2),
        (EOS, 1),
        ("x</answer>" + EOS, 10),  # what follows the tag is not of the response
        ("x</ans" + EOS + "wer>", 7),  # the end comes first
        ("</answer</answer>", 17),
        ("<answer>x", 9),
    ],
)
def test_length_of_characters(text: str, length: int) -> None:
    tokenizer = characters()
    ids = tokenizer.convert_tokens_to_ids(list(text))
    assert response_length(ids, tokenizer, {tokenizer.eos_token_id}) == length
    assert brute_force_length(ids, tokenizer, {tokenizer.eos_token_id}) == length


@cache
def subword_tokenizers() -> dict[str, Any]:
    found = {"byte level": byte_level()}
    for name, tokenizer in other_tokenizers().items():
        # Those that can write the tag at all.
        ids = tokenizer.encode(f"so {TAG}", add_special_tokens=False)
        if TAG in tokenizer.decode(ids, skip_special_tokens=True):
            found[name] = tokenizer
    return found


@settings(max_examples=25, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([TAG, "</ans", "wer>", " ", "3.5", "<", "ü", "\n", "the "])),
    cut=st.integers(0, 5),
    eos_at=st.one_of(st.none(), st.integers(0, 30)),
)
def test_length_of_subwords(pieces: list[str], cut: int, eos_at: int | None) -> None:
    """Pieces encoded together and alone, so that the tag is split in many ways."""
    for tokenizer in subword_tokenizers().values():
        together = tokenizer.encode("".join(pieces[:cut]), add_special_tokens=False)
        alone = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces[cut:]]
        ids = together + [token for piece in alone for token in piece]
        eos = {tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0}
        if eos_at is not None:
            ids[eos_at:eos_at] = list(eos)
        assert response_length(ids, tokenizer, eos) == brute_force_length(ids, tokenizer, eos)


def test_the_tag_is_split_differently_in_context() -> None:
    tokenizer = byte_level()
    splits = {
        tuple(tokenizer.convert_ids_to_tokens(tokenizer.encode(text))[-3:])
        for text in (TAG, f"x{TAG}", f"x {TAG}", f"3{TAG}\n", f"{TAG}>")
    }
    assert len(splits) > 1


def test_rows_end_after_a_tag() -> None:
    tokenizer = byte_level()
    prompt = tokenizer.encode(f"say {TAG} or </ans")
    texts = ["wer> no", f"it is {TAG}", f"{TAG} " + "and on " * TAIL, "</answer", f"3{TAG}>\n"]
    rows = [prompt + tokenizer.encode(text) for text in texts]

    def ended(ids: list[list[int]]) -> list[bool]:
        given = torch.tensor(ids)
        return after_answer(given, None, prompt_length=len(prompt), tokenizer=tokenizer).tolist()

    for row, text in zip(rows, texts, strict=True):
        # A tag further back than the tail ended its response long ago.
        assert ended([row]) == [TAG in text and len(row) - len(prompt) <= TAIL]
    width = min(map(len, rows))
    together = [row[:width] for row in rows]
    assert ended(together) == [TAG in tokenizer.decode(row[len(prompt) :]) for row in together]


def run(chains: list[str], prompts: list[str], new: int = 30) -> list[str]:
    """Greedy responses of a model that knows the chains, as text with the end shown."""
    tokenizer = characters()
    model = bigram_model(chain_logits(tokenizer, chains))
    config = GenerationConfig(do_sample=False, max_new_tokens=new)
    found = generate(model, tokenizer, prompts, 1, config, batch_size=8)
    return ["".join(tokenizer.convert_ids_to_tokens(ids)) for [ids] in found]


def test_generation_stops_at_the_tag() -> None:
    chain = "</answer>x<"  # around for ever
    assert run([chain], ["x", "</answer>", "</ans", "y</answer>x"]) == [
        "</answer>",
        "x</answer>",  # the tag of the prompt does not count
        "wer>x</answer>",  # nor one begun there
        "</answer>",
    ]


def test_generation_without_the_tag_runs_on() -> None:
    assert run(["xyzx"], ["x", "y"], new=7) == ["yzxyzxy", "zxyzxyz"]
    assert run(["</answer>x<"], ["x"], new=8) == ["</answer"]
    assert run(["</answer>x<"], ["x"], new=9) == ["</answer>"]


def test_generation_stops_at_the_end_of_sequence() -> None:
    assert run([f"xyz{EOS}"], ["x", "y", "z"]) == [f"yz{EOS}", f"z{EOS}", EOS]


def test_end_of_sequence_tokens() -> None:
    tokenizer = SimpleNamespace(eos_token_id=5)
    assert eos_token_ids(tokenizer, None) == [5]
    assert eos_token_ids(tokenizer, 3) == [5, 3]
    assert eos_token_ids(tokenizer, [3, 5, 9]) == [5, 3, 9]
    nothing = SimpleNamespace(eos_token_id=None)
    assert eos_token_ids(nothing, [3]) == [3]
    assert eos_token_ids(nothing, None) == []
