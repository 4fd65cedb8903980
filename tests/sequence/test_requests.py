"""Which pairs share a request."""

from __future__ import annotations

import numpy as np

from vllm.score.results import TokenScores
from vllm.score.sequence.boundary import SplitTokens
from vllm.score.sequence.requests import plan_requests


def test_single_tokens_after_the_same_tokens_are_candidates_of_one_request():
    splits = [
        SplitTokens([5, 6, 1], 2),
        SplitTokens([5, 6, 1, 2], 2),
        SplitTokens([5, 6, 2], 2),
        SplitTokens([5, 6, 1], 2),  # again
        SplitTokens([5, 7, 2], 2),
        SplitTokens([5, 6, 1, 2], 2),  # again
        SplitTokens([5, 6, 1, 2], 3),  # begins later
    ]
    plan = plan_requests(splits)
    assert plan.requests == [
        {"prompt_token_ids": [5, 6, 1], "target_token_ids": [[1, 2]]},
        {"prompt_token_ids": [5, 6, 1, 2], "target_token_ids": [1, 2]},
        {"prompt_token_ids": [5, 7, 2], "target_token_ids": [[2]]},
        {"prompt_token_ids": [5, 6, 1, 2], "target_token_ids": [[2]]},
    ]
    answers = [
        TokenScores(None, np.float32([[-1, -2]])),
        TokenScores(None, np.float32([-3, -4])),
        TokenScores(None, np.float32([[-5]])),
        TokenScores(None, np.float32([[-6]])),
    ]
    got = [plan.token_logprobs(answers, i).tolist() for i in range(len(splits))]
    assert got == [[-1], [-3, -4], [-2], [-1], [-5], [-3, -4], [-6]]


def test_no_pairs_are_no_requests():
    assert plan_requests([]).requests == []
