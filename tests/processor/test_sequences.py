"""Padding, taking it away again, and batches of responses of unequal length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.processor.teacher_forced import LENGTHS, VOCAB, random_responses
from vllm.score.errors import ScoreModeError
from vllm.score.processor.sequences import check_fit, pad_batch, responses_of, row_batches

IDS = st.integers(0, 50)


@st.composite
def batches(draw):
    groups, each = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    prompts = [draw(st.lists(IDS, min_size=1, max_size=6)) for _ in range(groups)]
    responses = [[draw(st.lists(IDS, max_size=5)) for _ in range(each)] for _ in range(groups)]
    return prompts, responses


@given(batches(), IDS)
def test_padding_comes_off_again(given_batch, pad):
    # The padding's id may well be a token of the sequences.
    prompts, responses = given_batch
    batch = pad_batch(prompts, responses, pad, lambda ids: " ".join(map(str, ids)))
    width = max(map(len, prompts))
    longest = max(len(r) for group in responses for r in group)
    assert batch.sequences.shape == (len(prompts), len(responses[0]), width + longest)
    assert batch.prompt_lens == [width] * len(prompts)
    found = responses_of(batch)
    assert [(r.prompt, r.number) for r in found] == [
        (b, g) for b in range(len(prompts)) for g in range(len(responses[0]))
    ]
    for r in found:
        assert r.ids.tolist() == prompts[r.prompt] + responses[r.prompt][r.number]
        assert r.generated.tolist() == responses[r.prompt][r.number]
        assert r.prompt_length == len(prompts[r.prompt])
        assert batch.responses_text[r.prompt][r.number] == " ".join(map(str, r.generated.tolist()))


def test_lengths_may_be_tensors():
    given = batch(prompt_lens=torch.tensor([2, 2]), gen_lens=[torch.tensor([2, 0]), [1, 2]])
    assert [r.length for r in responses_of(given)] == [2, 0, 1, 2]


def batch(**changes):
    made = pad_batch([[1, 2], [3]], [[[4, 5], []], [[6], [7, 8]]], 0, lambda ids: "")
    return dataclasses.replace(made, **changes)


def mask(*places):
    changed = batch().attention_masks.clone()
    for place in places:
        changed[place] = 1 - changed[place]
    return changed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sequences": torch.zeros(2, 4, dtype=torch.int64)}, r"sequences must be .* \[B, G, L\]"),
        (
            {"attention_masks": torch.ones(2, 2, 3)},
            r"attention_masks .* the same shape.* \(2, 2, 3\)",
        ),
        ({"prompt_lens": [2]}, r"prompt_lens must be 2 times the one length .* got \[2\]"),
        ({"prompt_lens": [2, 1]}, r"prompt_lens must be 2 times .* got \[2, 1\]"),
        ({"prompt_lens": [2, 0]}, "prompt_lens must be a list, each entry a whole number of at"),
        ({"gen_lens": [[2, 0], [1]]}, r"gen_lens 2 lengths .* and \[2, 1\] lengths"),
        ({"gen_lens": [[2, 0]]}, r"gen_lens 2 lengths .* and \[2\] lengths"),
        (
            {"gen_lens": [[2, 0], 1]},
            "gen_lens must be a list, each entry a list, each",
        ),
        ({"gen_lens": [[3, 0], [1, 2]]}, r"gen_lens\[0\]\[0\] is 3"),
        ({"gen_lens": [[-1, 0], [1, 2]]}, r"gen_lens\[0\]\[0\] is -1"),
        ({"prompt_lens": [9, 9]}, r"attention_masks\[0, 0\] does not fit"),
        ({"gen_lens": [[1, 0], [1, 2]]}, r"attention_masks\[0, 0\] does not fit"),
        ({"attention_masks": mask((0, 0, 1))}, r"attention_masks\[0, 0\] does not fit"),
        (
            {"attention_masks": mask((1, 1, 1))},
            r"attention_masks\[1, 1\] does not fit: a prompt of at least one",
        ),
    ],
)
def test_a_batch_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ScoreModeError, match=message):
        responses_of(batch(**changes))


def test_batches_hold_every_response_that_is_not_empty_once() -> None:
    responses = random_responses()
    batches = list(row_batches(responses, 2, "cpu"))
    assert [place for places, _ in batches for place in places] == [4, 0, 1, 3]
    for places, batch in batches:
        width = batch.input_ids.shape[1]
        row = 0
        for i, place in enumerate(places):
            n, length = LENGTHS[place]
            assert batch.attention_mask[i].tolist() == [1] * (n + length - 1) + [0] * (
                width - n - length + 1
            )
            assert batch.lengths[i] == length
            for step in range(length):
                at = divmod(int(batch.rows[row]), width)
                assert at == (i, n + step - 1)
                assert batch.tokens[row] == responses[place].ids[n + step]
                row += 1


def test_ids_that_the_model_does_not_have() -> None:
    check_fit(random_responses(), VOCAB, 18, "cut it")
    for wrong in (VOCAB, -1):
        responses = random_responses()
        responses[3].ids[-1] = wrong
        with pytest.raises(ScoreModeError, match=rf"response \[3\]\[0\]\[3\] is {wrong}, outside "):
            check_fit(responses, VOCAB, 18, "cut it")
    with pytest.raises(ScoreModeError, match=r"\[4\]\[0\] has 18 tokens .* takes 17: cut it"):
        check_fit(random_responses(), VOCAB, 17, "cut it")
