"""Admission of a score request: from what the user gave to what the engine computes.

The engine receives the prompt without its last token. That token's own row is never scored, so
nothing is lost, a token of work is saved, and a prompt may be as long as the model's context.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from pydantic import Field

from vllm.exceptions import VLLMValidationError
from vllm.score.checks import Flag, Fraction, Number, Whole, check
from vllm.score.engine.parts import TEXT, Parts, placeholder_ids, prompt_ids, reads_items_one_way
from vllm.score.errors import ScoreModeError
from vllm.score.ops.statistics import FULL_VOCABULARY, RowLayout, check_statistics
from vllm.score.tokens import own_prefix_note, prefix_once, read_token_id_rows, read_token_ids

FULL_VOCABULARY_BYTES_VARIABLE = "VLLM_SCORE_FULL_VOCAB_BYTES"
DEFAULT_FULL_VOCABULARY_BYTES = 4 << 30

# Key of a prompt, `TokensPrompt(target_token_ids=...)`.
TARGETS = "target_token_ids"

# Attribute of sampling parameters whose prompt must stay as vLLM has tokenised it: an ordinary
# request of a client that does not know of score mode.
AS_TOKENISED = "score_as_tokenised"
# Attribute of sampling parameters whose scores nobody reads as stock prompt log-probabilities.
NO_VIEW = "score_no_view"

# Attribute of the input processor of an `LLM`, whose user may ask for any number of values.
NO_CLIENT_LIMIT = "score_mode_no_client_limit"

# Options that mean nothing without sampling: (field, value that is accepted, what to do). The table
# in SCORE_MODE_IMPLEMENTATION.md follows this list.
_NOTHING = "nothing is generated; leave it out"
_UNCONSTRAINED = "scores are those of the unconstrained model; leave it out"
REFUSED_OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("n", 1, "a prompt has one score; send the request once"),
    ("stop", [], _NOTHING),
    ("stop_token_ids", [], _NOTHING),
    ("min_tokens", 0, _NOTHING),
    ("logprobs", None, "use prompt_logprobs, target_token_ids or score_statistics"),
    ("logprob_token_ids", None, "use target_token_ids in the prompt"),
    ("prompt_logprob_token_ids", None, "use target_token_ids in the prompt"),
    ("prompt_logprob_start", None, "use target_token_ids in the prompt"),
    ("structured_outputs", None, _UNCONSTRAINED),
    ("logit_bias", None, _UNCONSTRAINED),
    ("allowed_token_ids", None, _UNCONSTRAINED),
    ("bad_words", [], _UNCONSTRAINED),
    ("trace_decode_token_ids", None, _NOTHING),
    ("kv_transfer_params", {}, "a transferred prefix has no hidden states to score; leave it out"),
)

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("score_mode", Flag),
    ("prompt_logprobs", Annotated[Whole, Field(ge=FULL_VOCABULARY)] | None),
    ("score_temperature", Annotated[Number, Field(gt=0)]),
    ("score_top_p", Fraction),
)


class InvalidScoreRequest(VLLMValidationError, ScoreModeError):
    """Caught as ValueError offline, answered with status 400 by the server.

    Args:
        message: names the field, the value and the remedy.
        parameter: the field.
    """

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        VLLMValidationError.__init__(self, message, parameter=parameter)

    def __str__(self) -> str:
        # The sentence names the field already; the stock class would append it.
        return str(self.args[0])


@contextmanager
def refusing(field: str) -> Iterator[None]:
    """Raise what is wrong with a field of a request as InvalidScoreRequest; also a decorator."""
    try:
        yield
    except ScoreModeError as error:
        raise InvalidScoreRequest(str(error), parameter=field) from None


def check_field(field: str, value: Any, kind: Any) -> Any:
    """`vllm.score.checks.check` of a field of a request.

    Raises:
        InvalidScoreRequest: the value is not of that kind.
    """
    with refusing(field):
        return check(field, value, kind)


def check_options(params: Any) -> None:
    """Check the score options of `SamplingParams`, and refuse those that a score cannot honour.

    Raises:
        InvalidScoreRequest: names the field, its value and the remedy.
    """
    if params.score_statistics is not None:
        with refusing("score_statistics"):
            params.score_statistics = list(check_statistics(params.score_statistics))
    for field, kind in _OPTIONS:
        setattr(params, field, check_field(field, getattr(params, field), kind))
    for field, accepted, remedy in REFUSED_OPTIONS:
        value = getattr(params, field, (params.extra_args or {}).get(field))
        if value is not None and value != accepted:
            raise InvalidScoreRequest(
                f"{field}={value!r} cannot be combined with score_mode=True: {remedy}.",
                parameter=field,
            )


@refusing("truncate_prompt_tokens")
def check_truncation(length: int | None) -> None:
    """Refuse that a prompt with targets is cut."""
    if length is not None:
        raise ScoreModeError(
            f"truncate_prompt_tokens={length} would shift {TARGETS}: truncate the prompt and the "
            "targets yourself."
        )


def check_prompt(engine_input: Any, resumable: bool) -> None:
    """Refuse kinds of prompt that cannot be scored.

    Raises:
        InvalidScoreRequest: names the kind and the remedy.
    """
    kind = engine_input.get("type")
    if kind not in ("token", "multimodal", "embeds"):
        raise InvalidScoreRequest(
            f"prompt cannot be combined with score_mode=True where a prompt is of type {kind!r}: "
            "give prompt_token_ids or a text.",
            parameter="prompt",
        )
    if resumable:
        raise InvalidScoreRequest(
            "streaming input cannot be combined with score_mode=True: send the whole prompt.",
            parameter="resumable",
        )


@dataclass(frozen=True)
class ModelFacts:
    """What admission needs to know of the model and the front end.

    Attributes:
        max_logprobs: values per position that a client may ask for; None: no limit. A server keeps
            vLLM's own limit for its clients, `LLM` has none.
        placeholders: what tokens stand for that are no text, by token id.
        embedding_size: of a row of `prompt_embeds`.
        misreads_items: the engine computes positions of images and the like as the model does not.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int | None = None
    placeholders: Mapping[int, str] = dataclasses.field(default_factory=dict)
    embedding_size: int | None = None
    misreads_items: bool = False

    @classmethod
    def of(cls, input_processor: Any) -> ModelFacts:
        """From the `InputProcessor` of an engine."""
        model = input_processor.model_config
        unlimited = model.max_logprobs == -1 or getattr(input_processor, NO_CLIENT_LIMIT, False)
        limit = None if unlimited else model.max_logprobs
        return cls(
            model.get_vocab_size(),
            model.max_model_len,
            limit,
            placeholder_ids(model),
            model.get_inputs_embeds_size(),
            reads_items_one_way(model),
        )


class ScoreSpec(msgspec.Struct, frozen=True, eq=False):
    """One admitted request, from the front end to the worker and back: what is scored, and how.

    The field `_score` of the engine's `SamplingParams` carries it; their other fields stay the
    user's.

    Attributes:
        targets: int32 [m, k]; the last m positions are scored.
        start: engine prompt position whose hidden state scores the first target.
        layout: the columns that come back.
        vocab_size: V, as the front end knows it.
        flat: targets were given as a flat list, so results are [m] instead of [m, k].
        unread: the end of the prompt that the engine is not given: its last token, or nothing.
        notes: for whoever reads the result.
        view_ranks: the statistic `rank` was not asked for: it is the view's.
    """

    targets: np.ndarray
    start: int
    layout: RowLayout
    vocab_size: int
    flat: bool = True
    unread: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    view_ranks: bool = False

    @property
    def result_shape(self) -> tuple[int, int]:
        """(m, columns)."""
        return len(self.targets), self.layout.width(self.vocab_size)

    @property
    def end(self) -> int:
        """Behind the last scored position of the engine's prompt, which is its last one."""
        return self.start + len(self.targets)

    @property
    def full_vocabulary_bytes(self) -> int:
        """Bytes of a whole vocabulary's result; 0 of others."""
        rows, width = self.result_shape
        return 4 * rows * width if self.layout.top == FULL_VOCABULARY else 0


class AdmittedRequest(NamedTuple):
    """A checked request, as `add_request` of an engine takes it.

    Attributes:
        ids: int64 [n], the whole prompt; placeholders of images and the like count one each.
        params: a copy of the `SamplingParams` that carries the `ScoreSpec`.
        given: the prompt, where it is not tokens alone and has to be rendered.
    """

    ids: np.ndarray
    params: Any
    given: dict[str, Any] | None = None

    @property
    def prompt(self) -> dict[str, Any]:
        """The rendered prompt of one that is tokens."""
        return {"type": "token", "prompt_token_ids": self.ids.tolist()}

    @property
    def spec(self) -> ScoreSpec:
        spec: ScoreSpec = self.params._score
        return spec


def admit(
    prompt_token_ids: Any,
    target_token_ids: Any,
    params: Any,
    facts: ModelFacts,
    bytes_in_use: int = 0,
    notes: tuple[str, ...] = (),
    view: bool = False,
    parts: Parts = TEXT,
) -> AdmittedRequest:
    """Check one score request and say what the engine is to compute.

    Args:
        prompt_token_ids: [n] ids.
        target_token_ids: None, m ids, or m lists of k ids, for the last m positions.
        params: `SamplingParams` with `score_mode=True`.
        facts: of the model and front end.
        bytes_in_use: full-vocabulary results already admitted and not finished.
        notes: what the result is to say of the prompt.
        view: somebody may read the results as stock prompt log-probabilities, which have ranks.
        parts: what of the prompt is no text.

    Raises:
        InvalidScoreRequest: (a ValueError) naming the field, the value and the remedy.
    """
    ids = _prompt_ids(prompt_token_ids, facts)
    top = _top(params.prompt_logprobs, target_token_ids is not None, facts.vocab_size)
    with refusing("multi_modal_data"):
        parts.check_ids(ids, facts.placeholders)
        if parts.spans and facts.misreads_items:
            raise ScoreModeError(
                f"{parts.spans[0].modality!r} in multi_modal_data cannot be scored here: the model "
                "attends both ways between the positions of an item, and vLLM's attention on a CPU "
                "only backwards, which is another model; use a GPU, or prompts of text."
            )
    if target_token_ids is None:
        with refusing(TARGETS):
            first = parts.first_own(len(ids))
        targets, flat = ids[first:, None].astype(np.int32), True
        notes += parts.note(first)
    else:
        targets, flat = _targets(target_token_ids, len(ids), facts.vocab_size)
        with refusing(TARGETS):
            parts.check_targets(len(ids) - len(targets), len(ids))
    if not len(targets):
        notes += ("the prompt is one token, which has no context: nothing was scored",)
    _check_values_per_position(top, targets.shape[1], facts)
    statistics = tuple(params.score_statistics or ())
    # Of whole rows the view counts them itself.
    view_ranks = view and top != FULL_VOCABULARY and "rank" not in statistics
    spec = ScoreSpec(
        targets=targets,
        start=max(len(ids) - len(targets) - 1, 0),
        layout=RowLayout(
            num_targets=0 if top == FULL_VOCABULARY else targets.shape[1],
            statistics=(*statistics, "rank") if view_ranks else statistics,
            top=top,
            temperature=params.score_temperature,
            top_p=params.score_top_p,
        ),
        vocab_size=facts.vocab_size,
        flat=flat,
        unread=(int(ids[-1]),) if len(ids) > 1 else (),
        notes=notes,
        view_ranks=view_ranks,
    )
    _check_bytes(spec, bytes_in_use)
    params = copy.copy(params)
    params._score = spec
    return AdmittedRequest(ids, params)


def admit_tokenised(
    engine_input: Mapping[str, Any],
    params: Any,
    facts: ModelFacts,
    tokenizer: Any,
    bytes_in_use: int = 0,
    view: bool = False,
) -> AdmittedRequest:
    """`admit` for a prompt that vLLM has rendered, with its special tokens in front once.

    Args:
        engine_input: with "prompt_token_ids" or "prompt_embeds", "prompt" where they come from a
            text, and perhaps "target_token_ids".
        tokenizer: of the engine.
    """
    with refusing("prompt_embeds"):
        ids = prompt_ids(engine_input, facts.embedding_size)
    parts = Parts.of(engine_input)
    notes: tuple[str, ...] = ()
    text = engine_input.get("prompt")
    if hasattr(params, AS_TOKENISED):
        facts = dataclasses.replace(facts, placeholders={})  # words to stock vLLM, too
    elif isinstance(text, str) and tokenizer is not None and not parts.embedded:
        given = len(ids)
        ids, own = prefix_once(tokenizer, text, ids)
        parts = parts.shifted(given - len(ids))
        notes = (own_prefix_note(tokenizer),) if own else ()
    targets = engine_input.get(TARGETS)
    return admit(ids, targets, params, facts, bytes_in_use, notes, view, parts)


@refusing("prompt_token_ids")
def _prompt_ids(given: Any, facts: ModelFacts) -> np.ndarray:
    """The checked ids of a prompt, int64 [n]."""
    ids = read_token_ids(given, facts.vocab_size, "prompt_token_ids")
    if len(ids) == 0:
        raise ScoreModeError(
            "the prompt has no token; give a text that is not empty, or at least one token id."
        )
    if len(ids) > facts.max_model_len:
        raise ScoreModeError(
            f"prompt_token_ids has {len(ids)} tokens, the engine's max_model_len is "
            f"{facts.max_model_len}: shorten the prompt or score it in windows "
            "(vllm.score.perplexity)."
        )
    return ids


@refusing(TARGETS)
def _targets(given: Any, prompt_len: int, vocab_size: int) -> tuple[np.ndarray, bool]:
    """The checked targets, int32 [m, k], and whether they were a flat list."""
    rows = read_token_id_rows(given, vocab_size, TARGETS)
    if len(rows) == 0:
        raise ScoreModeError(f"{TARGETS} is empty: leave it out to score the whole prompt.")
    if len(rows) > prompt_len - 1:
        raise ScoreModeError(
            f"{TARGETS} has {len(rows)} rows, but a prompt of {prompt_len} tokens has "
            f"{prompt_len - 1} positions with a context; the targets are aligned to its end."
        )
    flat = rows.ndim == 1
    return (rows[:, None] if flat else rows).astype(np.int32), flat


@refusing("prompt_logprobs")
def _top(prompt_logprobs: int | None, with_targets: bool, vocab_size: int) -> int:
    """How many most likely tokens are to come back; without targets None is the vocabulary."""
    if with_targets and prompt_logprobs == FULL_VOCABULARY:
        raise ScoreModeError(
            "the whole vocabulary (prompt_logprobs=-1, full_vocabulary=True) and target_token_ids "
            "exclude each other: leave one of them out."
        )
    top = (0 if with_targets else FULL_VOCABULARY) if prompt_logprobs is None else prompt_logprobs
    if top > vocab_size:
        raise ScoreModeError(f"prompt_logprobs is {top}, the vocabulary has {vocab_size} tokens.")
    return top


def _check_values_per_position(top: int, candidates: int, facts: ModelFacts) -> None:
    """Keep to the number of values that a server allows its clients."""
    asked = facts.vocab_size if top == FULL_VOCABULARY else max(top, candidates)
    if facts.max_logprobs is not None and asked > facts.max_logprobs:
        field = TARGETS if 0 <= top < asked else "prompt_logprobs"
        raise InvalidScoreRequest(
            f"{field} asks for {asked} values per position, this server allows max_logprobs="
            f"{facts.max_logprobs}: name the tokens in target_token_ids, or start the server with "
            "a larger --max-logprobs.",
            parameter=field,
        )


@refusing(TARGETS)
def _check_bytes(spec: ScoreSpec, bytes_in_use: int) -> None:
    """Keep to the bytes that whole-vocabulary results of unfinished requests may take together."""
    needed, name = spec.full_vocabulary_bytes, FULL_VOCABULARY_BYTES_VARIABLE
    limit = check(name, os.environ.get(name, DEFAULT_FULL_VOCABULARY_BYTES), int)
    if needed and bytes_in_use + needed > limit:
        raise ScoreModeError(
            f"the whole vocabulary of {spec.vocab_size} tokens at {spec.result_shape[0]} positions "
            f"takes {needed:,} bytes, with {bytes_in_use:,} in use by unfinished requests more "
            f"than the limit of {limit:,} bytes: name the tokens that you need in {TARGETS}, send "
            f"fewer requests at once, or raise {name}."
        )
