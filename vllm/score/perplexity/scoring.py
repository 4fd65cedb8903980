"""Scoring the windows of a plan, group by group, through the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.api import score
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.metrics import PlanTotals
from vllm.score.perplexity.store import Store, part_schema
from vllm.score.perplexity.windows import ScoringPlan, TextStream, Window

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm import LLM

# A group is added to the engine's queue at once: within what `score` keeps in flight.
MAX_GROUP_WINDOWS = 2048

# windows -> for each the float32 log-probabilities of its targets, nats
Scorer = Callable[[Sequence[Window]], list[np.ndarray]]
# called after each group: (its windows, how many were scored now rather than read, totals so far)
Report = Callable[[Sequence[Window], int, PlanTotals], None]


def engine_scorer(llm: LLM) -> Scorer:
    """Scores with vLLM, so that equal groups get equal bits.

    A score's last bits depend on the batch that computed it; the groups are the same in every run.
    """

    def run(windows: Sequence[Window]) -> list[np.ndarray]:
        requests = [
            {"prompt_token_ids": window.token_ids, "target_token_ids": window.target_ids}
            for window in windows
        ]
        results = score(llm, requests, reproducible=True, use_tqdm=False)
        return [result.logprobs for result in results]

    return run


@dataclass
class PlanScorer:
    """Scores the plans of one run.

    store: where scores are kept.
    score: scores windows that are neither stored nor known.
    group_tokens: prompt tokens in a group (more only where one window is longer).
    decode: token id -> characters, for tokens whose place in the text is not known; None: such
        characters are left out.
    known: windows of all plans so far; None where no second plan will come.
    """

    store: Store
    score: Scorer
    group_tokens: int
    decode: Callable[[int], str] | None = None
    known: ScoredWindows | None = None

    def run(self, plan: ScoringPlan, stream: TextStream, report: Report) -> PlanTotals:
        """Score what is not stored yet; add everything up."""
        key, totals, number = plan.key(), PlanTotals(plan), -1
        groups = group_windows(stream.windows(plan), self.group_tokens)
        for number, group in enumerate(groups):
            digest, scored = group_digest(group), 0
            table = self.store.read(key, number, digest)
            if table is None:
                logprobs, scored = self._logprobs(group, key)
                totals.add(group, logprobs)  # refuses a NaN before it is stored
                self.store.write(key, number, digest, self._table(group, logprobs))
            else:
                totals.add(group, _column(table))
            if self.known is not None:
                self.known.add(key, number, group, digest)
            report(group, scored, totals)
        self.store.check_groups(key, number + 1)
        totals.finish(stream.documents)
        return totals

    def _logprobs(self, group: Sequence[Window], key: str) -> tuple[np.ndarray, int]:
        """float32 log-probabilities of all targets of the group, and how many windows were scored
        now."""
        known = self.known
        found = [None if known is None else known.lookup(window, key) for window in group]
        missing = [
            window for window, logprobs in zip(group, found, strict=True) if logprobs is None
        ]
        scored = iter(self.score(missing)) if missing else iter(())
        results = [next(scored) if logprobs is None else logprobs for logprobs in found]
        for window, logprobs in zip(group, results, strict=True):
            if logprobs.shape != (window.num_targets,):
                raise ScoreModeError(
                    f"window {window.index}: {window.num_targets} targets were sent, log-"
                    f"probabilities of shape {logprobs.shape} came back"
                )
        return np.concatenate(results).astype(np.float32, copy=False), len(missing)

    def _table(self, group: Sequence[Window], logprobs: np.ndarray) -> pa.Table:
        import pyarrow as pa

        counts = [window.num_targets for window in group]
        decode: Callable[[int], str | None] = self.decode or (lambda _: None)
        columns = [
            np.concatenate([np.arange(w.position, w.position + w.num_targets) for w in group]),
            [token for window in group for token in window.target_ids],
            [text for w in group for text in w.texts or map(decode, w.target_ids)],
            logprobs,
            np.repeat([window.index for window in group], counts),
        ]
        schema = part_schema()
        return pa.Table.from_arrays(
            [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
        )


class ScoredWindows:
    """Windows already scored, found again by their prompt.

    A window of another plan with the same prompt and no more targets needs no second pass. Holds
    about 150 bytes per window; the scores stay in the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places: dict[bytes, tuple[str, int, int, int]] = {}
        self._digests: dict[tuple[str, int], str] = {}
        self._last: tuple[tuple[str, int], np.ndarray] | None = None

    def add(self, plan: str, number: int, group: Sequence[Window], digest: str) -> None:
        """A stored group."""
        self._digests[plan, number] = digest
        end = 0
        for window in group:
            end += window.num_targets
            prompt = window.digest()
            if self._places.get(prompt, ("", 0, 0, 0))[3] < window.num_targets:
                self._places[prompt] = plan, number, end, window.num_targets

    def lookup(self, window: Window, asking: str) -> np.ndarray | None:
        """The log-probabilities of the window's targets, float32; None if no plan but the one
        `asking` has scored them."""
        plan, number, end, targets = self._places.get(window.digest(), ("", 0, 0, 0))
        if targets < window.num_targets or plan == asking:
            return None
        place = plan, number
        if self._last is None or self._last[0] != place:
            table = self._store.read(plan, number, self._digests[place])
            if table is None:
                return None
            self._last = place, _column(table)
        return self._last[1][end - window.num_targets : end]


def group_windows(windows: Iterable[Window], group_tokens: int) -> Iterator[list[Window]]:
    """Consecutive windows: at most `group_tokens` prompt tokens and `MAX_GROUP_WINDOWS`, at least
    one window."""
    group: list[Window] = []
    tokens = 0
    for window in windows:
        full = tokens + len(window.token_ids) > group_tokens or len(group) == MAX_GROUP_WINDOWS
        if group and full:
            yield group
            group, tokens = [], 0
        group.append(window)
        tokens += len(window.token_ids)
    if group:
        yield group


def group_digest(group: Sequence[Window]) -> str:
    """sha256 of the prompts, the numbers of targets and their positions."""
    digest = hashlib.sha256()
    for window in group:
        digest.update(window.digest())
        digest.update(f"{window.num_targets} {window.position} {window.index}\n".encode())
    return digest.hexdigest()


def _column(table: Any) -> np.ndarray:
    return table.column("logprob").to_numpy()
