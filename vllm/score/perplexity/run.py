"""`perplexity`: from a text and a model to metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm.auto import tqdm

from vllm.score.armed import require_score_mode
from vllm.score.data import TokenIdsSource, as_source
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.conventions import HF_STRIDE
from vllm.score.perplexity.job import GROUP_TOKENS, Job, Settings, prepare
from vllm.score.perplexity.metrics import (
    RUN,
    PerplexityResult,
    PlanTotals,
    Provenance,
    guide_metrics,
    token_metrics,
)
from vllm.score.perplexity.scoring import PlanScorer, Report, ScoredWindows, Scorer, engine_scorer
from vllm.score.perplexity.store import (
    Store,
    describe_engine,
    describe_model,
    describe_tokenizer,
    versions,
)
from vllm.score.perplexity.windows import ScoringPlan, TextStream, Window
from vllm.score.report.numbers import significant

if TYPE_CHECKING:
    from vllm import LLM


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
    engine = {
        "model": describe_model(llm),
        "engine": describe_engine(llm),
        "versions": versions(),
    }
    return score_job(job, engine_scorer(llm), engine, store=store, resume=resume, use_tqdm=use_tqdm)


def tokenizer_of(llm: LLM) -> Any:
    """The engine's tokenizer; None if it has none."""
    return llm.get_tokenizer() if llm.llm_engine.renderer.tokenizer is not None else None


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
    known = ScoredWindows(kept) if job.conventions else None
    scorer = PlanScorer(kept, score, job.settings.group_tokens, _decoder(job.tokenizer), known)
    done: dict[str, tuple[PlanTotals, TextStream]] = {}

    def scored(plan: ScoringPlan, name: str) -> tuple[PlanTotals, TextStream, Provenance]:
        if (key := plan.key()) not in done:
            stream = job.stream(plan)
            with _progress(job, stream, name, use_tqdm) as report:
                done[key] = scorer.run(plan, stream, report), stream
        totals, stream = done[key]
        return totals, stream, _provenance(job, fingerprint, plan, name, totals, stream)

    try:
        totals, stream, provenance = scored(job.plan, RUN)
        metrics = totals.metrics(provenance)
        notes = job.source.notes() + _notes(job.plan, totals, stream)
        for request in job.conventions:
            totals, _, provenance = scored(request.plan, request.label)
            if request.convention.name == HF_STRIDE:
                metrics += guide_metrics(totals, provenance)
            elif totals.text is not None:
                metrics += totals.metrics(provenance)
            else:
                metrics += token_metrics(totals, provenance)
            notes.append(f"{request.convention.name}: {request.convention.faults}")
    finally:
        kept.close()
    return PerplexityResult(tuple(metrics), tuple(dict.fromkeys(notes)), kept, job.plan.key())


@contextmanager
def _progress(
    job: Job, stream: TextStream, name: str, use_tqdm: bool | Callable[..., tqdm]
) -> Iterator[Report]:
    """A tqdm bar over the tokens of a text: tokens done, tokens/s, time left, perplexity so far.

    The number of tokens of a streamed text is not known beforehand: it is estimated from the
    tokens per byte so far, where the source knows its size in bytes.
    """
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
    job: Job,
    fingerprint: dict[str, Any],
    plan: ScoringPlan,
    name: str,
    totals: PlanTotals,
    stream: TextStream,
) -> Provenance:
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
        tokenizer_sha256=fingerprint["tokenizer"]["sha256"],
        model=fingerprint["model"]["name"],
        model_sha256=fingerprint["model"]["weights_sha256"],
        dtype=fingerprint["engine"]["dtype"],
        quantization=fingerprint["engine"]["quantization"],
        versions=fingerprint["versions"],
        block_length=None,
    )


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


def _decoder(tokenizer: Any) -> Callable[[int], str] | None:
    if tokenizer is None:
        return None
    return lru_cache(maxsize=1 << 16)(lambda token: str(tokenizer.decode([token])))
