"""From (context, continuation) token pairs to as few score requests as answer them.

Pairs that differ in the last token only need the same hidden states: they become one request with
several candidates. The one-token options of a multiple-choice question cost one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm.score.results import TokenScores

TokenPair = tuple[list[int], list[int]]


@dataclass
class _Group:
    """Pairs whose tokens are the same but for the last one.

    Attributes:
        body: the tokens before the last, [n-1].
        rows: the longest continuation among them, m.
        columns: last token to column.
    """

    body: list[int]
    rows: int = 0
    columns: dict[int, int] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        last = list(self.columns)
        targets = [[token] * len(last) for token in self.body[len(self.body) + 1 - self.rows :]]
        return {
            "prompt_token_ids": [*self.body, last[0]],
            "target_token_ids": [*targets, last],
        }


class MergedRequests:
    """The score requests of a list of pairs, and the way back.

    Args:
        pairs: (context, continuation) token ids, at least one token each.
    """

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        groups: dict[tuple[int, ...], int] = {}
        merged: list[_Group] = []
        # By pair: group, column, and the continuation.
        self._places: list[tuple[int, int, list[int]]] = []
        for context, continuation in pairs:
            body = [*context, *continuation[:-1]]
            index = groups.setdefault(tuple(body), len(merged))
            if index == len(merged):
                merged.append(_Group(body))
            group = merged[index]
            group.rows = max(group.rows, len(continuation))
            column = group.columns.setdefault(continuation[-1], len(group.columns))
            self._places.append((index, column, continuation))
        self.requests = [group.request() for group in merged]

    def answers(self, scores: Sequence[TokenScores]) -> list[tuple[float, bool]]:
        """By pair: log-probability of the continuation in nats, and whether it is greedy.

        Greedy means that each of its tokens is the argmax of its position (the lowest id among
        equals), which is how lm-eval defines it.

        Args:
            scores: of `requests`, with the statistic `argmax`.
        """
        found = []
        for index, column, continuation in self._places:
            rows = slice(-len(continuation), None)
            logprobs = scores[index].logprobs[rows, column]
            greedy = np.array_equal(scores[index].statistics["argmax"][rows], continuation)
            found.append((float(logprobs.sum(dtype=np.float64)), greedy))
        return found
