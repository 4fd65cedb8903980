"""What reasoning takes beside its rule, and the texts that make a model go on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from vllm.score.checks import Seed, Whole, describe, limits_of, settings
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.report import METRICS, EIGMetrics
from vllm.score.errors import ScoreModeError

_Zero = Annotated[Whole, Field(ge=0)]
_ESCAPES = {r"\n": "\n", "\\\\": "\\"}


@dataclass(frozen=True)
class Parameter:
    """A field of a rule or of `Options`, as its class declares it.

    Attributes:
        kind: its annotation.
        default: where it is not given.
        meaning: what it is, with its unit.
    """

    kind: Any
    default: Any
    meaning: str

    @property
    def type(self) -> Any:
        """int, float, or what else it is an annotation of."""
        kind = self.kind
        while get_origin(kind) is Annotated or type(None) in get_args(kind):
            kind = get_args(kind)[0]
        return kind

    @property
    def help(self) -> str:
        """One line for a command's help or a table: meaning and range."""
        return f"{self.meaning}; {describe(self.kind)}"

    @property
    def bounds(self) -> tuple[float, float]:
        """Of a number; both ends are allowed."""
        limits = limits_of(self.kind)
        return limits.get("ge", -math.inf), limits.get("le", math.inf)

    def read(self, value: Any) -> Any:
        """A number as users write it, e.g. "8" or 8.0 for 8; None where it is none of this type."""
        try:
            number: Any = float(value) if isinstance(value, str) else value
        except ValueError:
            return None
        wrong = isinstance(number, bool) or not isinstance(number, Real) or number != number
        return None if wrong or (self.type is int and number % 1) else number


def parameters_of(cls: type) -> dict[str, Parameter]:
    """The fields of a `@settings` class."""
    kinds = get_type_hints(cls, include_extras=True)
    found = {}
    for each in fields(cls):
        parts = getattr(kinds[each.name], "__metadata__", ())
        texts = [part.description for part in parts if isinstance(part, FieldInfo)]
        meaning = next((text for text in texts if text), "")
        found[each.name] = Parameter(kinds[each.name], each.default, meaning)
    return found


@dataclass(frozen=True)
class ContinuationPrompts:
    """One text for each size of the expected gain.

    Attributes:
        large, moderate, small: inserted behind the reasoning; not blank.
        neutral: for forecasts, made before the gain is known.
        large_ratio, moderate_ratio: a gain above this multiple of the cost is large, moderate;
            any other is small.
        large_nats, moderate_nats: the same where the cost is 0.

    Raises:
        ScoreModeError: a blank text; a bound that is not positive and finite; a large bound that
            is not above the moderate one.
    """

    large: str = "\nWait, much is still open. Let me take another route and check every step:\n"
    moderate: str = "\nWait, I should check the steps that decide this:\n"
    small: str = "\nWait, one last check:\n"
    neutral: str = "\nWait,"
    large_ratio: float = 3.0
    moderate_ratio: float = 1.5
    large_nats: float = 0.5
    moderate_nats: float = 0.1

    def __post_init__(self) -> None:
        for name in ("large", "moderate", "small", "neutral"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise ScoreModeError(
                    f"{name} is {text!r}; give a text that is not blank, or the model ends its "
                    "reasoning again at once."
                )
        for unit in ("ratio", "nats"):
            large, moderate = getattr(self, f"large_{unit}"), getattr(self, f"moderate_{unit}")
            if not (0 < moderate < large < math.inf):
                raise ScoreModeError(
                    f"large_{unit} is {large} and moderate_{unit} is {moderate}; they must be "
                    "finite, the moderate bound above 0 and below the large one."
                )

    def choose(self, gain: float, lambda_cost: float) -> str:
        """The text for an expected gain, both in nats.

        Raises:
            ScoreModeError: a gain that is NaN, or a cost that is negative, infinite or NaN.
        """
        if math.isnan(gain):
            raise ScoreModeError("gain is NaN; there is no continuation prompt without a gain.")
        if not 0 <= lambda_cost < math.inf:
            raise ScoreModeError(f"lambda_cost is {lambda_cost}; it must be finite and at least 0.")
        large, moderate = self.large_nats, self.moderate_nats
        if lambda_cost:
            large, moderate = self.large_ratio * lambda_cost, self.moderate_ratio * lambda_cost
        if gain > large:
            return self.large
        return self.moderate if gain > moderate else self.small


def _texts(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ScoreModeError(f"think_end is {given!r}; give a text or a list of texts.")
    return tuple(texts)


def unescape(text: str) -> str:
    r"""A text of a command line, with each `\n` as a line break and each `\\` as a backslash.

    Whatever else follows a backslash stays as it is: `\boxed{` needs no doubling.
    """
    return re.sub(r"\\[n\\]", lambda found: _ESCAPES[found[0]], text)


@settings
class Options:
    """What every rule takes beside its parameters.

    Attributes:
        candidates: "beam", "sampled", "numeric", "boxed"; a `CandidateSource`; a list of answers
            for all questions, or one list for each.
        answer_end: None: the end-of-sequence token; "": nothing.
        think_end: a text or a list of texts.
        prompts: what is inserted where the model is overruled.
        metrics: count the decisions; by default those of `get_eig_metrics_summary`.

    Raises:
        ScoreModeError: a value that cannot be used, or an option that there is not.
    """

    candidates: Annotated[
        Any,
        Field(
            description="where candidate answers come from: beam or sampled (the model's own, "
            "after the cue), numeric or boxed (what its reasoning says)"
        ),
    ] = "beam"
    answer_cue: Annotated[str, Field(description="asks for the answer, after the reasoning")] = (
        AnswerFormat.cue
    )
    answer_end: Annotated[str | None, Field(description="ends an answer")] = AnswerFormat.end
    length_normalization: Annotated[
        Literal["none", "tokens", "bytes"],
        Field(
            description="divide the log-probability of an answer by its tokens or bytes; or none"
        ),
    ] = "none"
    decide_at: Annotated[
        Literal["step", "end"],
        Field(
            description="step: before every sample_length tokens; end: only where the model ends "
            "its reasoning by itself (budget forcing)"
        ),
    ] = "step"
    max_tokens_thinking: Annotated[
        _Zero | None,
        Field(description="tokens of reasoning at most, with what is inserted; 1024 by default"),
    ] = None
    thinking_n_ignore: Annotated[
        _Zero,
        Field(
            description="how often the model is told to go on where it ends its reasoning and a "
            "step pays"
        ),
    ] = 4
    think_end: Annotated[
        tuple[str, ...],
        BeforeValidator(_texts),
        Field(description="text that ends the reasoning, e.g. </think>"),
    ] = ()
    prompts: ContinuationPrompts = ContinuationPrompts()
    seed: Annotated[Seed, Field(description="of the choice among forecasts")] = 0
    metrics: EIGMetrics = METRICS

    def __post_init__(self) -> None:
        _ = self.answer_format  # refuses a cue that cannot be used

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(self.answer_cue, self.answer_end)
