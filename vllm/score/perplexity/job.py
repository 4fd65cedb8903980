"""The arguments of a run, checked and resolved before a model has to do anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm.score.data import Source, TokenIdsSource
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.conventions import ConventionRequest, resolve
from vllm.score.perplexity.plans import ScoringPlan, bos_tokens, join_documents
from vllm.score.perplexity.scoring import MAX_GROUP_TOKENS
from vllm.score.perplexity.stream import TextStream
from vllm.score.perplexity.tokenize import TokenChunk, limit_tokens, tokenize_documents
from vllm.score.perplexity.windows import SlidingWindows


@dataclass(frozen=True)
class Job:
    """A run with all settings resolved; `run_job` needs no model but a scorer."""

    source: Source
    tokenizer: Any
    plan: ScoringPlan
    bos: str
    conventions: tuple[ConventionRequest, ...]
    max_tokens: int | None
    group_tokens: int

    def settings(self) -> dict[str, Any]:
        """What the prompts and their grouping depend on."""
        return {
            **self.plan.describe(),
            "bos": self.bos,
            "max_tokens": "all" if self.max_tokens is None else self.max_tokens,
            "group_tokens": self.group_tokens,
        }

    def chunks(self, plan: ScoringPlan) -> Iterator[TokenChunk]:
        """The tokens of the source, as the plan joins the documents."""
        if isinstance(self.source, TokenIdsSource):
            chunks: Iterator[TokenChunk] = (
                TokenChunk(0 if plan.separator is not None else index, ids, None, None)
                for index, ids in enumerate(self.source.documents)
            )
        else:
            pieces = join_documents(self.source.pieces(), plan.separator)
            chunks = tokenize_documents(self.tokenizer, pieces)
        return limit_tokens(chunks, self.max_tokens)


def prepare(
    source: Source,
    tokenizer: Any,
    *,
    context_length: int,
    stride: int,
    bos: str,
    separator: str | None,
    conventions: str | Iterable[str],
    max_tokens: int | None,
    group_tokens: int,
) -> Job:
    """Check and resolve the arguments of `perplexity`."""
    for field, value in (("max_tokens", max_tokens), ("group_tokens", group_tokens)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ScoreModeError(f"{field} is {value!r}; it must be an integer of at least 1")
    if group_tokens > MAX_GROUP_TOKENS:
        raise ScoreModeError(
            f"group_tokens is {group_tokens}; it must be at most {MAX_GROUP_TOKENS}"
        )
    ids_given = isinstance(source, TokenIdsSource)
    if tokenizer is None and not ids_given:
        raise ScoreModeError(
            "the engine has no tokenizer (skip_tokenizer_init=True): give token ids, or start it "
            "with its tokenizer"
        )
    rule = "never" if ids_given and bos == "auto" else bos
    prefix, every_window = bos_tokens(rule, tokenizer)
    plan = ScoringPlan(
        SlidingWindows(context_length, stride, reserved=len(every_window)),
        separator=separator,
        prefix=prefix,
        every_window=every_window,
        prefix_once=bool(prefix or every_window),
    )
    requests = resolve(
        conventions, tokenizer, context_length=context_length, stride=stride, ids_given=ids_given
    )
    return Job(source, tokenizer, plan, bos, tuple(requests), max_tokens, group_tokens)


def check_windows(job: Job) -> None:
    """Raise ScoreModeError where the text is too short for the run's windows or a convention's.

    Reads as much of the text as the first windows need.
    """
    if not _has_window(job, job.plan):
        raise nothing_to_score(job)
    for request in job.conventions:
        name = f"convention {request.label!r}"
        try:
            enough = _has_window(job, request.plan)
        except ScoreModeError as error:
            raise ScoreModeError(f"{name}: {error}") from error
        if not enough:
            raise ScoreModeError(
                f"{name}: the text ({job.source.name}) is too short for its windows; give a longer "
                "text, or leave the convention out"
            )


def nothing_to_score(job: Job) -> ScoreModeError:
    """The error of a text without a token that has a token of context."""
    remedy = "give a longer text"
    bos = getattr(job.tokenizer, "bos_token_id", None)
    if bos is not None and not (job.plan.prefix or job.plan.every_window):
        remedy += ", or put a BOS in front of it (bos='start', --bos start)"
    return ScoreModeError(
        f"the text ({job.source.name}) has no token with a token of context: nothing can be "
        f"scored; {remedy}"
    )


def _has_window(job: Job, plan: ScoringPlan) -> bool:
    stream = TextStream(job.chunks(plan))
    windows = stream.windows_of(plan)
    return next(windows, None) is not None


def check_fits(job: Job, max_model_len: int) -> None:
    """Raise ScoreModeError for a window longer than the model's."""
    if job.plan.windows.context_length > max_model_len:
        raise ScoreModeError(
            f"context_length is {job.plan.windows.context_length}, more than the engine's "
            f"max_model_len {max_model_len}; pass context_length={max_model_len} or less (and a "
            "stride of at most that), or start the engine with a larger max_model_len if the "
            "model allows it"
        )
    for request in job.conventions:
        prompt = request.context_length + request.convention.predicted
        if prompt > max_model_len:
            name = request.convention.name
            fitting = max_model_len - request.convention.predicted
            raise ScoreModeError(
                f"convention {name!r} has windows of {prompt} tokens, more than the engine's "
                f"max_model_len {max_model_len}; ask for '{name}:{fitting}', or start the engine "
                "with a larger max_model_len"
            )
