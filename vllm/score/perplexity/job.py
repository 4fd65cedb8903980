"""The settings of a run, and a job: settings that have been checked against a text and a model.

`prepare` finds all that can be wrong before a model has to do anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, tee
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from vllm.score.checks import Count, Whole, settings
from vllm.score.data import Source, TokenIdsSource
from vllm.score.data.tokenize import TokenChunk, limit_tokens, tokenize_documents
from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.conventions import (
    ConventionRequest,
    check_fits,
    convention_names,
    resolve,
)
from vllm.score.perplexity.store import UNKNOWN, describe_tokenizer
from vllm.score.perplexity.windows import ScoringPlan, SlidingWindows, TextStream
from vllm.score.tokens import automatic_prefix

GROUP_TOKENS = 131072


@settings
class Settings:
    """What a run scores.

    context_length: tokens of a window, BOS included.
    stride: tokens scored in each window but the first; at most context_length.
    bos: the rule for the BOS: "auto": what tokenizer(text) itself puts in front of the text;
        "start": a BOS in front of the text, whatever the tokenizer does by itself; "window": a BOS
        in front of every window (for models that cannot do without one, e.g. Gemma); "never":
        nothing in front of the text.
    separator: joins documents into one text; None: each is a text of its own.
    conventions: of `CONVENTIONS`, or names with a window size, or "all".
    max_tokens: score only the first tokens of the text.
    group_tokens: prompt tokens sent to the engine at a time; as many as `score` keeps in flight.
    """

    context_length: Annotated[Whole, Field(ge=2)] = 2048
    stride: Count = 512
    bos: Literal["auto", "start", "window", "never"] = "auto"
    separator: str | None = "\n\n"
    conventions: Annotated[tuple[str, ...], BeforeValidator(convention_names)] = ()
    max_tokens: Count | None = None
    group_tokens: Annotated[Count, Field(le=1 << 20)] = GROUP_TOKENS

    def __post_init__(self) -> None:
        if self.stride > self.context_length:
            raise ScoreModeError(
                f"stride is {self.stride}, more than context_length {self.context_length}: tokens "
                "between the windows would never be scored; choose a stride of at most "
                "context_length."
            )


@dataclass(frozen=True)
class Job:
    """A run with all settings resolved, made by `prepare`.

    plan: the run's own windows. conventions: those asked for.
    """

    settings: Settings
    source: Source
    tokenizer: Any
    plan: ScoringPlan
    conventions: tuple[ConventionRequest, ...]
    # separator -> a pass over the text of which the first windows have been read, to be continued
    _begun: dict[str | None, Iterator[TokenChunk]] = field(default_factory=dict, compare=False)

    def fingerprint(self) -> dict[str, Any]:
        """What the prompts and their grouping depend on."""
        chosen = self.settings
        return {
            "tokenizer": describe_tokenizer(self.tokenizer),
            "settings": {
                **self.plan.describe(),
                "bos": chosen.bos,
                "max_tokens": "all" if chosen.max_tokens is None else chosen.max_tokens,
                "group_tokens": chosen.group_tokens,
            },
            "text": {
                "sha256": self.source.content_sha256() or UNKNOWN,
                **({"skip_empty": True} if self.source.skip_empty else {}),
            },
        }

    def stream(self, plan: ScoringPlan) -> TextStream:
        """The tokens of the text, its documents joined as the plan says."""
        begun = self._begun.pop(plan.separator, None)
        return TextStream(begun or self._chunks(plan.separator))

    def check_windows(self) -> None:
        """Raise ScoreModeError where the text is too short for the run's windows or a convention's.

        Reads as much of the text as the first windows need, and keeps it for `stream`.
        """
        named = [(f"convention {r.label!r}: ", r.plan) for r in self.conventions]
        for name, plan in [("", self.plan), *named]:
            chunks = self._begun.get(plan.separator) or self._chunks(plan.separator)
            self._begun[plan.separator], probe = tee(chunks)
            stream = TextStream(probe)
            try:
                enough = next(stream.windows(plan), None) is not None
            except ScoreModeError as error:
                raise ScoreModeError(f"{name}{error}") from error
            if not enough and name:
                raise ScoreModeError(
                    f"{name}the text ({self.source.name}) is too short for its windows; give a "
                    "longer text, or leave the convention out"
                )
            if not enough:
                what = "has no token with a token of context" if stream.tokens else "is empty"
                remedy = "give a longer text"
                bos = getattr(self.tokenizer, "bos_token_id", None)
                if bos is not None and not (plan.prefix or plan.every_window):
                    remedy += ", or put a BOS in front of it (bos='start', --bos start)"
                raise ScoreModeError(
                    f"the text ({self.source.name}) {what}: nothing can be scored; {remedy}"
                )

    def _chunks(self, separator: str | None) -> Iterator[TokenChunk]:
        """A new pass over the text."""
        chunks: Iterator[TokenChunk]
        if isinstance(self.source, TokenIdsSource):
            joined = separator is not None
            chunks = (
                TokenChunk(0 if joined else number, ids, None, None)
                for number, ids in enumerate(self.source.documents)
            )
        else:
            chunks = tokenize_documents(self.tokenizer, _joined(self.source.pieces(), separator))
        limit = self.settings.max_tokens
        return chunks if limit is None else limit_tokens(chunks, limit)


def prepare(
    settings: Settings, source: Source, tokenizer: Any, max_model_len: int | None = None
) -> Job:
    """Resolve settings for a text and a model, and check all of it: the BOS, the conventions, that
    the windows fit the model, that the text can be read (to its end, but with max_tokens) and is
    long enough.

    Args:
        tokenizer: the model's; None only for token ids.
        max_model_len: of the engine; None: it will be started with what the job needs.

    Raises:
        ScoreModeError: something does not fit.
    """
    ids_given = isinstance(source, TokenIdsSource)
    if tokenizer is None and not ids_given:
        raise ScoreModeError(
            "the engine has no tokenizer (skip_tokenizer_init=True): give token ids, or start it "
            "with its tokenizer"
        )
    prefix, every_window = _bos_tokens(settings.bos, tokenizer, ids_given)
    windows = SlidingWindows(settings.context_length, settings.stride, reserved=len(every_window))
    plan = ScoringPlan(
        windows,
        separator=settings.separator,
        prefix=prefix,
        every_window=every_window,
        prefix_once=bool(prefix or every_window),
    )
    sizes = {"context_length": settings.context_length, "stride": settings.stride}
    requests = resolve(settings.conventions, tokenizer, **sizes, ids_given=ids_given)
    job = Job(settings, source, tokenizer, plan, tuple(requests))
    if max_model_len is not None:
        limit = f"the engine's max_model_len {max_model_len} (raise it, if the model allows that)"
        names, size = settings.conventions, settings.context_length
        check_fits(names, size, max_model_len, limit, prompts=True)
    if settings.max_tokens is None and source.content_sha256() is None:
        source.check()  # what a limit cuts off is not looked at
    job.check_windows()
    return job


def _bos_tokens(
    rule: str, tokenizer: Any, ids_given: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The BOS rule as (tokens in front of the text, tokens in front of every window)."""
    if rule == "never" or (rule == "auto" and ids_given):
        return (), ()
    if rule == "auto":
        return tuple(automatic_prefix(tokenizer)), ()
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise ScoreModeError(
            f"bos is {rule!r} and asks for a BOS token, but the model's tokenizer has none; use "
            "bos='never'"
        )
    return ((int(bos),), ()) if rule == "start" else ((), (int(bos),))


def _joined(pieces: Iterable[tuple[int, str]], separator: str | None) -> Iterator[tuple[int, str]]:
    """Documents as one text with `separator` between them, or as they are (None)."""
    for document, group in groupby(pieces, key=lambda piece: piece[0]):
        if document and separator is not None:
            yield 0, separator
        for _, text in group:
            yield document if separator is None else 0, text
