"""Continuations of contexts, as token ids: those that differ in their last token share a request.

Pairs of a context and a continuation whose tokens are the same but for the last one need the same
hidden states. They become one score request with several candidates per position: the one-token
options of a multiple-choice question cost one request. Equal pairs are computed once.

For texts and messages, and as the one call for users: `vllm.score.score_continuations`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vllm.score.api import score
from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

TokenPair = tuple[Sequence[int], Sequence[int]]
# Of a request's first candidate, so that candidates cannot share a request.
_STATISTICS_OF_A_TARGET = {"rank", "model_logprob"}


@dataclass(frozen=True, eq=False, repr=False)
class ContinuationScores(TokenScores):
    """The scores of one continuation of m tokens: `token_ids`, `logprobs` and `statistics` are [m].

    Attributes:
        spans_boundary: the first token also holds the end of the context.
        spanned_context: the characters of the context that it holds, or "".
    """

    spans_boundary: bool = False
    spanned_context: str = ""

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most likely one of its position (the lowest id among equals),
        which is how lm-eval defines it."""
        assert self.token_ids is not None
        return np.array_equal(self.statistics["argmax"], self.token_ids)

    def mean(self) -> float:
        """Log-probability per token, in nats."""
        return self.sum() / len(self)


class Place(NamedTuple):
    """Where the values of a pair stand.

    Attributes:
        request: index of its request.
        column: of its last token among the candidates.
        length: of its continuation, m.
    """

    request: int
    column: int
    length: int

    def of(self, values: np.ndarray) -> np.ndarray:
        """[m], from the values of the request: [rows, k], or [rows] where one holds for all k."""
        rows = values[-self.length :]
        return rows if rows.ndim == 1 else rows[:, self.column]


@dataclass
class _Group:
    """Pairs whose tokens are the same but for the last one.

    Attributes:
        body: the tokens before the last, [n - 1].
        rows: length of the longest continuation among them.
        columns: last token to column.
    """

    body: list[int]
    adapter: Hashable
    rows: int = 0
    columns: dict[int, int] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        last = list(self.columns)
        targets = [[token] * len(last) for token in self.body[len(self.body) + 1 - self.rows :]]
        return {"prompt_token_ids": [*self.body, last[0]], "target_token_ids": [*targets, last]}


class MergedContinuations:
    """The score requests of pairs, and where in their answers each pair finds its own.

    Attributes:
        requests: as `score()` takes them, with targets [rows, k].
        adapters: of each request.
        places: of each pair.

    Args:
        pairs: (context, continuation) token ids, at least one token each.
        adapters: of each pair; those with different ones share no request.
        width: candidates that one request may have per position, at most.
    """

    def __init__(
        self,
        pairs: Iterable[TokenPair],
        adapters: Sequence[Hashable] | None = None,
        width: float = math.inf,
    ) -> None:
        merged: list[_Group] = []
        by_body: dict[Hashable, list[int]] = {}
        self.places: list[Place] = []
        for pair, (context, continuation) in enumerate(pairs):
            *body, last = *context, *continuation
            adapter = None if adapters is None else adapters[pair]
            numbers = by_body.setdefault((adapter, *body), [])
            for number in numbers:  # all but the last one are full
                if last in merged[number].columns or len(merged[number].columns) < width:
                    break
            else:
                number = len(merged)
                numbers.append(number)
                merged.append(_Group(body, adapter))
            group = merged[number]
            group.rows = max(group.rows, len(continuation))
            column = group.columns.setdefault(last, len(group.columns))
            self.places.append(Place(number, column, len(continuation)))
        self.requests = [group.request() for group in merged]
        self.adapters = [group.adapter for group in merged]

    def scores(self, scores: Sequence[TokenScores]) -> list[ContinuationScores]:
        """By pair, from the scores of `requests`.

        Statistics of the target (`rank`, `model_logprob`) are those of a request's first
        candidate; they need `width=1`.
        """
        found = []
        for place in self.places:
            whole = scores[place.request]
            assert whole.token_ids is not None
            found.append(
                ContinuationScores(
                    place.of(whole.token_ids),
                    place.of(whole.logprobs),
                    {name: place.of(values) for name, values in whole.statistics.items()},
                    start=whole.start + len(whole) - place.length,
                    notes=whole.notes,
                )
            )
        return found


def score_token_pairs(
    llm: LLM,
    pairs: Sequence[TokenPair],
    *,
    lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    statistics: Sequence[str] = (),
    **options: Any,
) -> list[ContinuationScores]:
    """The scores of each pair; those that can share a request do.

    Args:
        pairs: (context, continuation) token ids, at least one token each.
        lora_request: an adapter for all pairs, or one (or None) for each.
        statistics, options: as for `vllm.score.score`.

    Raises:
        ScoreModeError: as `score()`; or adapters for another number of pairs.
    """
    several = lora_request if isinstance(lora_request, Sequence) else None
    adapters = [lora_request] * len(pairs) if several is None else list(several)
    if len(adapters) != len(pairs):
        raise ScoreModeError(
            f"lora_request has {len(adapters)} entries for {len(pairs)} pairs; give one for all, "
            "or one or None for each."
        )
    alone = _STATISTICS_OF_A_TARGET.intersection(statistics)
    merged = MergedContinuations(pairs, adapters, width=1 if alone else math.inf)
    scores = score(
        llm, merged.requests, lora_request=merged.adapters, statistics=statistics, **options
    )
    return merged.scores(scores)
