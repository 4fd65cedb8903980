"""`perplexity`: from a text and a model to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.data import TokenIdsSource, as_source
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity import conventions as known_conventions
from vllm.score.perplexity import figures
from vllm.score.perplexity.identity import (
    describe_engine,
    describe_model,
    describe_tokenizer,
    versions,
)
from vllm.score.perplexity.job import Job, check_fits, check_windows, nothing_to_score, prepare
from vllm.score.perplexity.plans import ScoringPlan, describe_bos
from vllm.score.perplexity.progress import Progress
from vllm.score.perplexity.result import RUN, Figure, PerplexityResult, Provenance
from vllm.score.perplexity.scoring import PlanRun, ScoredWindows, Scorer, engine_scorer
from vllm.score.perplexity.store import UNKNOWN, Store
from vllm.score.perplexity.stream import TextStream
from vllm.score.perplexity.totals import PlanTotals

if TYPE_CHECKING:
    from tqdm import tqdm

    from vllm import LLM

GROUP_TOKENS = 131072


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
        bos: "auto", "start", "window" or "never", see `plans.BOS_RULES`. With token ids "auto"
            puts nothing in front.
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
    from vllm.score.armed import require_score_mode

    require_score_mode()
    check_llm(llm)
    if store is not None and not isinstance(store, (str, Path)):
        raise ScoreModeError(f"store is {store!r}; give the name of a directory")
    tokenizer = llm.get_tokenizer() if llm.llm_engine.renderer.tokenizer is not None else None
    job = prepare(
        as_source(source, text_column=text_column, skip_empty=skip_empty),
        tokenizer,
        context_length=context_length,
        stride=stride,
        bos=bos,
        separator=separator,
        conventions=conventions,
        max_tokens=max_tokens,
        group_tokens=group_tokens,
    )
    check_fits(job, llm.llm_engine.model_config.max_model_len)
    check_windows(job)
    model, engine = describe_model(llm), describe_engine(llm)
    identity = {"model": model, "engine": engine, "versions": versions()}
    return run_job(job, engine_scorer(llm), identity, store=store, resume=resume, use_tqdm=use_tqdm)


def run_job(
    job: Job,
    score: Scorer,
    identity: dict[str, Any],
    *,
    store: str | Path | None = None,
    resume: bool = False,
    use_tqdm: bool | Callable[..., tqdm] = True,
) -> PerplexityResult:
    """Score and add up.

    Args:
        score: gives the log-probabilities of windows.
        identity: "model", "engine" and "versions", as `identity` describes them.
    """
    if resume and store is None:
        raise ScoreModeError("resume=True needs store=: the directory of the run to go on with")
    tokenizer_identity = (
        {"class": "none", "sha256": "none"}
        if job.tokenizer is None
        else describe_tokenizer(job.tokenizer)
    )
    if job.max_tokens is None:  # else what is not scored is not looked at
        job.source.check()
    text: dict[str, Any] = {"sha256": job.source.content_sha256() or UNKNOWN}
    if job.source.skip_empty:
        text["skip_empty"] = True
    fingerprint = {
        **identity,
        "tokenizer": tokenizer_identity,
        "settings": job.settings(),
        "text": text,
    }
    opened = Store.temporary() if store is None else Store.open(store, fingerprint, resume=resume)
    try:
        return _Runner(job, score, opened, fingerprint, use_tqdm).run()
    finally:
        opened.close()


class _Runner:
    def __init__(
        self,
        job: Job,
        score: Scorer,
        store: Store,
        fingerprint: dict[str, Any],
        use_tqdm: bool | Callable[..., tqdm],
    ) -> None:
        self._job, self._score, self._store = job, score, store
        self._fingerprint, self._use_tqdm = fingerprint, use_tqdm
        self._done: dict[str, tuple[PlanTotals, TextStream]] = {}
        self._known = ScoredWindows(store) if job.conventions else None

    def run(self) -> PerplexityResult:
        job = self._job
        totals, stream = self._plan(job.plan, RUN)
        made = figures.run_figures(totals, self._provenance(job.plan, RUN, totals, stream))
        notes = job.source.notes() + _notes(job.plan, totals, stream)
        for request in job.conventions:
            made += self._convention(request)
            notes.append(f"{request.convention.name}: {request.convention.faults}")
        unique = tuple(dict.fromkeys(notes))
        return PerplexityResult(tuple(made), unique, self._store, job.plan.key())

    def _convention(self, request: known_conventions.ConventionRequest) -> Sequence[Figure]:
        name = request.label
        totals, stream = self._plan(request.plan, name)
        provenance = self._provenance(request.plan, name, totals, stream)
        if request.convention.name == known_conventions.HF_STRIDE:
            return figures.guide_figures(totals, provenance)
        if totals.text is not None:
            return figures.run_figures(totals, provenance)
        return figures.token_figures(totals, provenance)

    def _plan(self, plan: ScoringPlan, name: str) -> tuple[PlanTotals, TextStream]:
        """Score a plan, unless an equal one has been scored."""
        if plan.key() in self._done:
            return self._done[plan.key()]
        job, size = self._job, self._job.source.size_bytes()
        stream = TextStream(job.chunks(plan))
        tokens = job.max_tokens
        if isinstance(job.source, TokenIdsSource):
            there = sum(len(ids) for ids in job.source.documents)
            tokens = there if tokens is None else min(tokens, there)
        title = "Scoring" if name == RUN else f"Scoring ({name})"
        progress = Progress(stream, title, size=size, tokens=tokens, use_tqdm=self._use_tqdm)
        with progress:
            totals = PlanRun(
                plan,
                self._store,
                self._score,
                job.group_tokens,
                decode=_decoder(job.tokenizer),
                known=self._known,
                report=progress.report,
            ).run(stream)
        if not totals.tokens:
            raise nothing_to_score(job)
        self._done[plan.key()] = totals, stream
        return totals, stream

    def _provenance(
        self, plan: ScoringPlan, name: str, totals: PlanTotals, stream: TextStream
    ) -> Provenance:
        seen = self._fingerprint
        text = totals.text
        return Provenance(
            convention=name,
            context_length=plan.windows.context_length,
            stride=plan.windows.step,
            windows=totals.windows,
            scored_tokens=totals.tokens,
            text_tokens=stream.tokens,
            bos=describe_bos(plan),
            documents=self._documents(plan),
            num_documents=stream.documents,
            words=None if text is None else text.words,
            bytes=None if text is None else text.bytes,
            text_sha256=stream.sha256(),
            text_source=self._job.source.name,
            tokenizer_sha256=seen["tokenizer"]["sha256"],
            model=seen["model"]["name"],
            model_sha256=seen["model"]["weights_sha256"],
            dtype=seen["engine"]["dtype"],
            quantization=seen["engine"]["quantization"],
            versions=seen["versions"],
            block_length=None,
        )

    def _documents(self, plan: ScoringPlan) -> str:
        if plan.separator is None:
            return "each alone"
        ids_given = isinstance(self._job.source, TokenIdsSource)
        return "one after the other" if ids_given else f"joined by {plan.separator!r}"


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
        texts = (
            "the text begins"
            if stream.documents == 1
            else (f"{stream.own_prefixes} of {stream.documents} texts begin")
        )
        notes.append(
            f"{texts} with the token that stands in front of a text (often a BOS): it is context, "
            "and none was put in front"
        )
    if stream.inner_prefixes:
        notes.append(
            "the token that stands in front of a text (often a BOS) is also inside, "
            f"{stream.inner_prefixes} times, and scored there like any other; where documents "
            "begin with it, score them apart (separator=None, --separate-documents)"
        )
    return notes


def _decoder(tokenizer: Any) -> Callable[[int], str] | None:
    if tokenizer is None:
        return None

    @lru_cache(maxsize=1 << 16)
    def decode(token: int) -> str:
        return str(tokenizer.decode([token]))

    return decode
