"""What reasoning takes beside its rule, and the texts that make a model go on."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from vllm.score.checks import Seed, Whole, settings
from vllm.score.eig.answers import AnswerFormat
from vllm.score.eig.report import METRICS, EIGMetrics
from vllm.score.errors import ScoreModeError

_Zero = Annotated[Whole, Field(ge=0)]
_ESCAPES = {r"\n": "\n", "\\\\": "\\"}


def parameters_of(cls: Any) -> dict[str, FieldInfo]:
    """The fields of a `@settings` class, with their annotations, defaults and descriptions."""
    return dict(cls.__pydantic_fields__)


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
        candidates: where candidate answers come from: "beam" or "sampled" (the model's own, after
            the cue), "numeric" or "boxed" (what its reasoning says); a `CandidateSource`; a list
            of answers for all questions, or one list for each.
        answer_cue: asks for the answer, after the reasoning.
        answer_end: ends an answer. None: the end-of-sequence token; "": nothing.
        length_normalization: divide the log-probability of an answer by its tokens or bytes.
        decide_at: "step": before every `sample_length` tokens; "end": only where the model ends
            its reasoning by itself (budget forcing).
        max_tokens_thinking: tokens of reasoning at most, with what is inserted; 1024 by default.
        thinking_n_ignore: how often the model is told to go on where it ends its reasoning and a
            step pays.
        think_end: a text or a list of texts that end the reasoning, e.g. "</think>".
        prompts: what is inserted where the model is overruled.
        seed: of the choice among forecasts.
        metrics: count the decisions; by default those of `get_eig_metrics_summary`.

    Raises:
        ScoreModeError: a value that cannot be used, or an option that there is not.
    """

    candidates: Any = "beam"
    answer_cue: str = AnswerFormat.cue
    answer_end: str | None = AnswerFormat.end
    length_normalization: Literal["none", "tokens", "bytes"] = "none"
    decide_at: Literal["step", "end"] = "step"
    max_tokens_thinking: _Zero | None = None
    thinking_n_ignore: _Zero = 4
    think_end: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ()
    prompts: ContinuationPrompts = ContinuationPrompts()
    seed: Seed = 0
    metrics: EIGMetrics = METRICS

    def __post_init__(self) -> None:
        _ = self.answer_format  # refuses a cue that cannot be used

    @property
    def answer_format(self) -> AnswerFormat:
        return AnswerFormat(self.answer_cue, self.answer_end)
