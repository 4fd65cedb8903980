"""Texts that make a model go on where it has ended its reasoning but going on pays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm.score.errors import ScoreModeError


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
