"""`perplexity`: from a text and a model to metrics, in groups of windows, through the store."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tqdm.auto import tqdm

from vllm.score.api import score as score_requests
from vllm.score.armed import require_score_mode
from vllm.score.data import TokenIdsSource, as_source
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.conventions import HF_STRIDE
from vllm.score.perplexity.job import GROUP_TOKENS, Job, Settings, prepare
from vllm.score.perplexity.metrics import RUN, PerplexityResult, PlanTotals, Provenance
from vllm.score.perplexity.store import (
    Store,
    describe_engine,
    describe_model,
    describe_tokenizer,
    part_schema,
    versions,
)
from vllm.score.perplexity.windows import ScoringPlan, TextStream, Window
from vllm.score.report.table import significant

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm import LLM

# A group is added to the engine's queue at once: within what `score` keeps in flight.
MAX_GROUP_WINDOWS = 2048

# windows -> for each the float32 log-probabilities of its targets, nats
Scorer = Callable[[Sequence[Window]], list[np.ndarray]]
# called after each group: (its windows, how many were scored now rather than read, totals so far)
Report = Callable[[Sequence[Window], int, PlanTotals], None]


def perplexity(
    llm: LLM,
    source: Any,
    *,
    context_length: int = 2048,
    stride: int = 512,
    bos: str = "auto",
    separator: str | None = "\n\n",
    conventions: str | Iterable[str] = (),
    max_tokens: int | None = None,
    store: str | Path | None = None,
    resume: bool = False,
    text_column: str | None = None,
    skip_empty: bool = False,
    group_tokens: int = GROUP_TOKENS,
    use_tqdm: bool | Callable[..., tqdm] = True,
) -> PerplexityResult:
    """Perplexity of a text under a model, in sliding windows.

    Every token is scored exactly once, with at least context_length - stride tokens of context
    where the text has them. The first token of the text has none, and is scored only after a BOS.

    Args:
        llm: the model.
        source: text, token ids, a dataset, or what `vllm.score.data.as_source` takes besides.
        context_length: tokens of a window, BOS included; at most the engine's max_model_len.
        stride: tokens scored in each window but the first. Smaller is closer to full context, and
            slower. Equal to context_length: windows side by side, whose first tokens are not
            scored.
        bos: "auto", "start", "window" or "never", see `job.Settings`. With token ids "auto" puts
            nothing in front.
        separator: joins documents into one text (lists of token ids follow each other without
            one); None: each is a text of its own.
        conventions: also compute the perplexity as these tools do, see `conventions.CONVENTIONS`.
            What the run's own windows already say is not scored again.
        max_tokens: score only the first tokens of the text.
        store: directory that keeps the scores as they come. None: nothing outlives the result.
        resume: go on with a run in `store`; it must have the same model, tokenizer, text, settings
            and versions. Conventions may be added.
        text_column: of a dataset or table file; by default "text".
        skip_empty: of a dataset or table file: leave out rows whose text is null, missing or
            empty. How many these were, the result's notes say.
        group_tokens: prompt tokens sent to the engine at a time; what a killed run loses at most.
        use_tqdm: show a progress bar; or a function that makes one.

    Raises:
        ScoreModeError: for arguments that do not fit together or the model, a text with nothing to
            score, a store that does not belong to this run, or scores that are not finite.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    require_score_mode()
    check_llm(llm)
    if store is not None and not isinstance(store, (str, Path)):
        raise ScoreModeError(f"store is {store!r}; give the name of a directory")
    settings = Settings(
        context_length=context_length,
        stride=stride,
        bos=cast(Any, bos),
        separator=separator,
        conventions=cast(Any, conventions),
        max_tokens=max_tokens,
        group_tokens=group_tokens,
    )
    text = as_source(source, text_column=text_column, skip_empty=skip_empty)
    job = prepare(settings, text, tokenizer_of(llm), llm.llm_engine.model_config.max_model_len)
    return run_job(llm, job, store=store, resume=resume, use_tqdm=use_tqdm)


def run_job(
    llm: LLM,
    job: Job,
    *,
    store: str | Path | None = None,
    resume: bool = False,
    use_tqdm: bool | Callable[..., tqdm] = True,
) -> PerplexityResult:
    """Score a prepared job. Where the engine's tokenizer is not the job's, the engine's counts."""
    tokenizer = tokenizer_of(llm)
    if tokenizer not in (None, job.tokenizer) and (
        describe_tokenizer(tokenizer) != describe_tokenizer(job.tokenizer)
    ):
        job = prepare(job.settings, job.source, tokenizer)
    engine = {"model": describe_model(llm), "engine": describe_engine(llm), "versions": versions()}
    return score_job(job, engine_scorer(llm), engine, store=store, resume=resume, use_tqdm=use_tqdm)


def tokenizer_of(llm: LLM) -> Any:
    """The engine's tokenizer; None if it has none."""
    return llm.get_tokenizer() if llm.llm_engine.renderer.tokenizer is not None else None


def engine_scorer(llm: LLM) -> Scorer:
    """Scores with vLLM, so that equal groups get equal bits.

    A score's last bits depend on the batch that computed it; the groups are the same in every run.
    """

    def score(windows: Sequence[Window]) -> list[np.ndarray]:
        requests = [
            {"prompt_token_ids": window.token_ids, "target_token_ids": window.target_ids}
            for window in windows
        ]
        results = score_requests(llm, requests, reproducible=True, use_tqdm=False)
        return [result.logprobs for result in results]

    return score


def score_job(
    job: Job,
    score: Scorer,
    engine: dict[str, Any],
    *,
    store: str | Path | None = None,
    resume: bool = False,
    use_tqdm: bool | Callable[..., tqdm] = True,
) -> PerplexityResult:
    """Score and add up.

    Args:
        score: gives the log-probabilities of windows.
        engine: "model", "engine" and "versions", as the functions of `store` describe them.
    """
    if resume and store is None:
        raise ScoreModeError("resume=True needs store=: the directory of the run to go on with")
    fingerprint = {**engine, **job.fingerprint()}
    kept = Store.temporary() if store is None else Store.open(store, fingerprint, resume=resume)
    run = _Run(job, kept, score, fingerprint, use_tqdm)
    try:
        totals, stream, provenance = run.scored(job.plan, RUN)
        metrics = totals.metrics(provenance)
        notes = job.source.notes() + _notes(job.plan, totals, stream)
        for request in job.conventions:
            totals, _, provenance = run.scored(request.plan, request.label)
            if request.convention.name == HF_STRIDE:
                metrics += totals.guide_metrics(provenance)
            elif totals.text is None:
                metrics += totals.token_metrics(provenance)
            else:
                metrics += totals.metrics(provenance)
            notes.append(f"{request.convention.name}: {request.convention.faults}")
    finally:
        kept.close()
        run.known.close()
    return PerplexityResult(tuple(metrics), tuple(dict.fromkeys(notes)), kept, job.plan.key())


@dataclass
class _Run:
    """Scores the plans of one job.

    score: scores windows that are neither stored nor known.
    fingerprint: what the scores depend on.
    """

    job: Job
    store: Store
    score: Scorer
    fingerprint: dict[str, Any]
    use_tqdm: bool | Callable[..., tqdm]
    _done: dict[str, tuple[PlanTotals, TextStream]] = field(default_factory=dict)
    # Of runs with conventions: the plan that scored a window, and its float32 log-probabilities. A
    # window of another plan with no more targets needs no second pass. In a temporary file.
    known: sqlite3.Connection = field(default_factory=lambda: sqlite3.connect(""))

    def __post_init__(self) -> None:
        self.known.execute("CREATE TABLE known (prompt, plan, targets, logprobs)")
        self.known.execute("CREATE UNIQUE INDEX once ON known (prompt, plan, targets)")
        tokenizer = self.job.tokenizer
        decode = (lambda _: None) if tokenizer is None else (lambda t: str(tokenizer.decode([t])))
        self._decode = lru_cache(maxsize=1 << 16)(decode)

    def scored(self, plan: ScoringPlan, name: str) -> tuple[PlanTotals, TextStream, Provenance]:
        """The sums of a plan for a convention, and what they come from."""
        if (key := plan.key()) not in self._done:
            stream = self.job.stream(plan)
            with self._progress(stream, name) as report:
                self._done[key] = self._score(plan, stream, report), stream
        totals, stream = self._done[key]
        return totals, stream, self._provenance(plan, name, totals, stream)

    def _score(self, plan: ScoringPlan, stream: TextStream, report: Report) -> PlanTotals:
        """Score what is not stored yet; add everything up."""
        key, totals, number = plan.key(), PlanTotals(plan), -1
        groups = group_windows(stream.windows(plan), self.job.settings.group_tokens)
        for number, group in enumerate(groups):
            digest, scored = group_digest(group), 0
            table = self.store.read(key, number, digest)
            if table is None:
                logprobs, scored = self._logprobs(group, key)
                totals.add(group, logprobs)  # refuses a NaN before it is stored
                self.store.write(key, number, digest, self._table(group, logprobs))
            else:
                logprobs = table["logprob"].to_numpy()
                totals.add(group, logprobs)
            if self.job.conventions:
                ends = np.cumsum([window.num_targets for window in group])
                parts = map(np.ndarray.tobytes, np.split(logprobs, ends[:-1]))
                self.known.executemany(
                    "INSERT OR IGNORE INTO known VALUES (?, ?, ?, ?)",
                    (
                        (w.digest(), key, w.num_targets, p)
                        for w, p in zip(group, parts, strict=True)
                    ),
                )
            report(group, scored, totals)
        self.store.check_groups(key, number + 1)
        totals.finish(stream.documents)
        return totals

    def _logprobs(self, group: Sequence[Window], key: str) -> tuple[np.ndarray, int]:
        """float32 log-probabilities of all targets of the group, and how many windows were scored
        now."""
        found: dict[int, np.ndarray] = {}
        for at, window in enumerate(group):
            for (known,) in self.known.execute(
                "SELECT logprobs FROM known WHERE prompt = ? AND plan != ? AND targets >= ?",
                (window.digest(), key, window.num_targets),
            ):
                found[at] = np.frombuffer(known, np.float32)[-window.num_targets :]
        missing = [at for at in range(len(group)) if at not in found]
        scored = self.score([group[at] for at in missing]) if missing else []
        for at, logprobs in zip(missing, scored, strict=True):
            if logprobs.shape != (targets := group[at].num_targets,):
                raise ScoreModeError(
                    f"window {group[at].index}: {targets} targets were sent, log-probabilities of "
                    f"shape {logprobs.shape} came back"
                )
            found[at] = logprobs
        joined = np.concatenate([found[at] for at in range(len(group))])
        return joined.astype(np.float32, copy=False), len(missing)

    def _table(self, group: Sequence[Window], logprobs: np.ndarray) -> pa.Table:
        import pyarrow as pa

        counts = [window.num_targets for window in group]
        columns = {
            "position": np.concatenate(
                [np.arange(w.position, w.position + w.num_targets) for w in group]
            ),
            "token_id": [token for window in group for token in window.target_ids],
            "text": [t for w in group for t in w.texts or map(self._decode, w.target_ids)],
            "logprob": logprobs,
            "window": np.repeat([window.index for window in group], counts),
        }
        return pa.table(columns, schema=part_schema())

    @contextmanager
    def _progress(self, stream: TextStream, name: str) -> Iterator[Report]:
        """A tqdm bar over the tokens of a text: tokens done, tokens/s, time left, perplexity so
        far.

        The number of tokens of a streamed text is not known beforehand: it is estimated from the
        tokens per byte so far, where the source knows its size in bytes.
        """
        job, use_tqdm = self.job, self.use_tqdm
        size = job.source.size_bytes()
        tokens = job.settings.max_tokens  # of the text, if known, or the most that are scored
        if isinstance(job.source, TokenIdsSource):
            there = sum(len(ids) for ids in job.source.documents)
            tokens = min(there, tokens or there)
        make: Callable[..., Any] = use_tqdm if callable(use_tqdm) else tqdm
        with make(
            total=tokens,
            desc="Scoring" if name == RUN else f"Scoring ({name})",
            unit="tok",
            unit_scale=True,
            disable=not use_tqdm,
            dynamic_ncols=True,
        ) as bar:

            def advance_to(done: int) -> None:
                bar.update(done - bar.n)
                bar.refresh()

            def report(group: Sequence[Window], scored: int, totals: PlanTotals) -> None:
                done = group[-1].position + group[-1].num_targets
                if not scored:  # read from the store: no part of the rate
                    bar.initial = done
                if size and stream.bytes:
                    estimate = round(stream.tokens * size / stream.bytes)
                    bar.total = max(min(estimate, tokens or estimate), done)
                bar.set_postfix_str(f"perplexity {significant(totals.perplexity)}", refresh=False)
                advance_to(done)

            yield report
            bar.total = stream.tokens
            advance_to(stream.tokens)

    def _provenance(
        self, plan: ScoringPlan, name: str, totals: PlanTotals, stream: TextStream
    ) -> Provenance:
        job, known = self.job, self.fingerprint
        text = totals.text
        if plan.separator is None:
            documents = "each alone"
        elif isinstance(job.source, TokenIdsSource):
            documents = "one after the other"
        else:
            documents = f"joined by {plan.separator!r}"
        return Provenance(
            convention=name,
            context_length=plan.windows.context_length,
            stride=plan.windows.step,
            windows=totals.windows,
            scored_tokens=totals.tokens,
            text_tokens=stream.tokens,
            bos=plan.describe_bos(),
            documents=documents,
            num_documents=stream.documents,
            words=None if text is None else text.words,
            bytes=None if text is None else text.bytes,
            text_sha256=stream.sha256(),
            text_source=job.source.name,
            tokenizer_sha256=known["tokenizer"]["sha256"],
            model=known["model"]["name"],
            model_sha256=known["model"]["weights_sha256"],
            dtype=known["engine"]["dtype"],
            quantization=known["engine"]["quantization"],
            versions=known["versions"],
        )


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


def _notes(plan: ScoringPlan, totals: PlanTotals, stream: TextStream) -> list[str]:
    notes = []
    unscored = stream.tokens - totals.tokens - stream.own_prefix_tokens
    if unscored and not plan.windows.covers_everything:
        notes.append(
            f"{unscored} of {stream.tokens} tokens were not scored: stride equals context_length, "
            "so the first token of each window has no context"
        )
    elif unscored:
        notes.append(
            f"{unscored} of {stream.tokens} tokens were not scored: there is no BOS, so the first "
            "token of a text has no context; words and bytes are those of the scored tokens"
        )
    if stream.own_prefixes:
        begun = f"{stream.own_prefixes} of {stream.documents} texts begin"
        notes.append(
            f"{'the text begins' if stream.documents == 1 else begun} with the token that stands "
            "in front of a text (often a BOS): it is context, and none was put in front"
        )
    if stream.inner_prefixes:
        notes.append(
            "the token that stands in front of a text (often a BOS) is also inside, "
            f"{stream.inner_prefixes} times, and scored there like any other; where documents "
            "begin with it, score them apart (separator=None, --separate-documents)"
        )
    return notes
