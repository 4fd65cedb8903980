"""Scoring the windows of a plan, group by group, through the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.plans import ScoringPlan
from vllm.score.perplexity.store import Store, part_schema
from vllm.score.perplexity.stream import TextStream, Window
from vllm.score.perplexity.totals import PlanTotals

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm import LLM

# A group is added to the engine's queue at once: within what `score` keeps in flight.
MAX_GROUP_TOKENS = 1 << 20
MAX_GROUP_WINDOWS = 2048

# windows -> for each the float32 log-probabilities of its targets, nats
Scorer = Callable[[Sequence[Window]], list[np.ndarray]]
# token id -> characters, for tokens whose place in the text is not known
Decode = Callable[[int], str]
# called after each group: (windows of the group, scored now rather than read or derived)
Report = Callable[[Sequence[Window], int], None]


def engine_scorer(llm: LLM) -> Scorer:
    """Scores with vLLM, so that equal groups get equal bits.

    A score's last bits depend on the batch that computed it; the groups are the same in every run.
    """
    from vllm.score.api import score

    def run(windows: Sequence[Window]) -> list[np.ndarray]:
        requests = [
            {"prompt_token_ids": window.token_ids, "target_token_ids": window.target_ids}
            for window in windows
        ]
        results = score(llm, requests, reproducible=True, use_tqdm=False)
        return [result.logprobs for result in results]

    return run


@dataclass
class PlanRun:
    """Everything needed to score the windows of one plan.

    Args:
        plan: what is scored.
        store: where scores are kept.
        score: scores windows that neither the store nor `known` have.
        group_tokens: prompt tokens in a group (more only where one window is longer).
        decode: see `Decode`; None leaves such characters out.
        known: windows that another plan has scored.
        report: see `Report`.
    """

    plan: ScoringPlan
    store: Store
    score: Scorer
    group_tokens: int
    decode: Decode | None = None
    known: ScoredWindows | None = None
    report: Report | None = None

    def run(self, stream: TextStream) -> PlanTotals:
        """Score what is not stored yet; add everything up."""
        key, totals = self.plan.key(), PlanTotals(self.plan)
        windows = stream.windows_of(self.plan)
        number = -1
        for number, group in enumerate(group_windows(windows, self.group_tokens)):
            digest = group_digest(group)
            table, scored = self.store.read(key, number, digest), 0
            if table is None:
                logprobs, scored = self._logprobs(group)
                table = self._table(group, logprobs)
                totals.add(group, _column(table))  # refuses a NaN before it is stored
                self.store.write(key, number, digest, table)
            else:
                totals.add(group, _column(table))
            if self.known is not None:
                self.known.add(key, number, group)
            if self.report is not None:
                self.report(group, scored)
        self.store.check_groups(key, number + 1)
        totals.finish(stream.documents)
        return totals

    def _logprobs(self, group: Sequence[Window]) -> tuple[np.ndarray, int]:
        """Log-probabilities of all targets of the group, and how many windows were scored now."""
        results: list[np.ndarray | None] = [
            None if self.known is None else self.known.lookup(window, self.plan.key())
            for window in group
        ]
        missing = [index for index, result in enumerate(results) if result is None]
        if missing:
            scored = self.score([group[index] for index in missing])
            for index, found in zip(missing, scored, strict=True):
                results[index] = found
        for window, result in zip(group, results, strict=True):
            if result is None or result.shape != (window.num_targets,):
                raise ScoreModeError(
                    f"window {window.index}: {window.num_targets} targets were sent, log-"
                    f"probabilities of shape {None if result is None else result.shape} came back"
                )
        return np.concatenate([r for r in results if r is not None]), len(missing)

    def _table(self, group: Sequence[Window], logprobs: np.ndarray) -> pa.Table:
        import pyarrow as pa

        counts = [window.num_targets for window in group]
        ids = [token for window in group for token in window.target_ids]
        texts: list[str | None] = []
        for window in group:
            texts += self._texts(window)
        position = np.concatenate(
            [np.arange(w.position, w.position + w.num_targets, dtype=np.int64) for w in group]
        )
        index = np.repeat(np.array([w.index for w in group], dtype=np.int64), counts)
        columns = [position, ids, texts, logprobs.astype(np.float32), index]
        schema = part_schema()
        return pa.Table.from_arrays(
            [pa.array(c, type=f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
        )

    def _texts(self, window: Window) -> Sequence[str | None]:
        if window.texts is not None:
            return window.texts
        decode = self.decode
        return [None if decode is None else decode(token) for token in window.target_ids]


class ScoredWindows:
    """Windows already scored, found again by their prompt.

    A window of another plan with the same prompt and no more targets needs no second pass. Holds
    about 150 bytes a window; the scores stay in the store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._places: dict[bytes, tuple[str, int, int, int]] = {}
        self._digests: dict[tuple[str, int], str] = {}
        self._last: tuple[tuple[str, int], np.ndarray] | None = None

    def add(self, plan: str, number: int, group: Sequence[Window]) -> None:
        """A stored group."""
        self._digests[plan, number] = group_digest(group)
        end = 0
        for window in group:
            end += window.num_targets
            digest = window.digest()
            if self._places.get(digest, ("", 0, 0, 0))[3] < window.num_targets:
                self._places[digest] = plan, number, end, window.num_targets

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
