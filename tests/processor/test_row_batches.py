"""Batches of responses of unequal length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processor.teacher_forced import LENGTHS, SMALL, VOCAB, load, random_responses
from vllm.score.errors import ScoreModeError
from vllm.score.processor.row_batches import check_ids, row_batches


def test_batches_hold_every_response_that_is_not_empty_once() -> None:
    responses = random_responses()
    batches = list(row_batches(responses, 2, "cpu"))
    assert [place for batch in batches for place in batch.places] == [4, 0, 1, 3]
    for batch in batches:
        width = batch.input_ids.shape[1]
        row = 0
        for i, place in enumerate(batch.places):
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


def test_ids_that_the_model_does_not_have(model_dir: Callable[..., Path]) -> None:
    model = load(model_dir("gpt2", **SMALL))
    good = random_responses()
    check_ids(model, good)
    for wrong in (VOCAB, -1):
        responses = random_responses()
        responses[3].ids[-1] = wrong
        with pytest.raises(ScoreModeError, match=rf"response \[3\]\[0\] has the token {wrong}; "):
            check_ids(model, responses)
    check_ids(model, random_responses([(2040, 9)]))
    with pytest.raises(ScoreModeError, match=r"\[0\]\[0\] is 2050 tokens.* has 2048 positions"):
        check_ids(model, random_responses([(2040, 10)]))
