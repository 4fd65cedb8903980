"""Split pairs as requests of `score()`, as few as will do, and their answers put back in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm.score.results import TokenScores
from vllm.score.sequence.boundary import SplitTokens


@dataclass(frozen=True)
class RequestPlan:
    """Requests, and where in their answers each pair's scores stand.

    Attributes:
        requests: as `score()` takes them.
        places: (request, column) of each pair; the column is None where the request is the
            pair's alone, whose scores are [m] then.
    """

    requests: list[dict[str, Any]]
    places: list[tuple[int, int | None]]

    def token_logprobs(self, scores: Sequence[TokenScores], pair: int) -> np.ndarray:
        """float32 [m], the log-probabilities of a pair's continuation, in nats."""
        request, column = self.places[pair]
        logprobs = scores[request].logprobs
        return logprobs if column is None else logprobs[:, column]


def plan_requests(splits: Sequence[SplitTokens]) -> RequestPlan:
    """One request for all continuations of one token after the same tokens; equal pairs share."""
    requests: list[dict[str, Any]] = []
    places: list[tuple[int, int | None]] = []
    candidates: dict[tuple[int, ...], tuple[int, dict[int, int]]] = {}
    longer: dict[tuple[int, ...], int] = {}
    for split in splits:
        ids, start = split.token_ids, split.start
        if start < len(ids) - 1:
            request = longer.setdefault((start, *ids), len(requests))
            if request == len(requests):
                requests.append({"prompt_token_ids": ids, "target_token_ids": ids[start:]})
            places.append((request, None))
            continue
        request, columns = candidates.setdefault(tuple(ids[:-1]), (len(requests), {}))
        if request == len(requests):
            requests.append({"prompt_token_ids": ids, "target_token_ids": [[]]})
        column = columns.setdefault(ids[-1], len(columns))
        if column == len(requests[request]["target_token_ids"][0]):
            requests[request]["target_token_ids"][0].append(ids[-1])
        places.append((request, column))
    return RequestPlan(requests, places)
