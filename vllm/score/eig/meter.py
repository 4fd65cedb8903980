"""What a decision costs, by component."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.score.eig.work import Batch, Sample, Score, Steps, T


class Meter:
    """Wall time by component, and tokens drawn and scored.

    Attributes:
        current: the component that runs, or ran last.
        seconds: by component.
        tokens_sampled, tokens_scored: over all components.
    """

    def __init__(self) -> None:
        self.current = ""
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens_sampled = self.tokens_scored = 0

    @contextmanager
    def component(self, name: str) -> Iterator[None]:
        """Count the time within as this component's."""
        self.current = name
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def steps(self, inner: Steps[T]) -> Steps[T]:
        """The same generator; the results that pass through are counted."""
        try:
            batch = next(inner)
            while True:
                try:
                    results = yield batch
                except Exception as error:
                    batch = inner.throw(error)
                else:
                    self._count(batch, results)
                    batch = inner.send(results)
        except StopIteration as stop:
            return stop.value

    def _count(self, batch: Batch, results: Sequence[Any]) -> None:
        for work, result in zip(batch.work, results, strict=True):
            if isinstance(work, Sample):
                self.tokens_sampled += sum(len(drawn.token_ids) for drawn in result)
            elif isinstance(work, Score):
                self.tokens_scored += sum(len(target) for target in work.targets)
