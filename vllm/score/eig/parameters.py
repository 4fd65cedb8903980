"""The parameters of reasoning: types, defaults, ranges, and what becomes of a value outside.

One table holds all of it; checks, help texts and documents read it there.
"""

from __future__ import annotations

import difflib
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

from vllm.score.errors import ScoreModeError

logger = logging.getLogger("vllm_score.eig")


@dataclass(frozen=True)
class Bound:
    """One parameter of a scaler.

    Attributes:
        kind: int or float.
        default, low, high: both ends are allowed.
        meaning: what it is, with its unit.
    """

    kind: type
    default: float
    low: float
    high: float
    meaning: str

    def __post_init__(self) -> None:
        if self.kind not in (int, float):
            raise ScoreModeError(f"kind is {self.kind!r}; a parameter is an int or a float.")
        if not self.low <= self.default <= self.high:  # a NaN fails, too
            raise ScoreModeError(
                f"default is {self.default!r}; it has to lie within {self.low!r} to {self.high!r}."
            )

    @property
    def range(self) -> str:
        """For people: both ends."""
        return f"{self.low:,.10g} to {self.high:,.10g}"

    @property
    def help(self) -> str:
        """One line for a command's help or a table: meaning and range."""
        return f"{self.meaning}; {self.range}"


# Defaults and ranges are those that users of this rule's Hugging Face version know.
BOUNDS: dict[str, Bound] = {
    "lambda_cost": Bound(float, 0.05, 0.0, 10.0, "cost of one more step, nats"),
    "beam_size": Bound(int, 8, 1, 20, "number of candidate answers"),
    "mc_samples": Bound(int, 5, 1, 20, "continuations sampled for a forecast"),
    "sample_length": Bound(int, 64, 1, 512, "length of a continuation, tokens"),
    "temperature": Bound(float, 1.0, 0.1, 2.0, "temperature of the continuations"),
    "top_p": Bound(float, 0.9, 0.1, 1.0, "probability mass that continuations are sampled from"),
    "max_computation_time": Bound(float, 30.0, 1.0, 300.0, "time limit of a decision, seconds"),
}
# Of the rules it is compared with.
RIVAL_BOUNDS: dict[str, Bound] = {
    "entropy_threshold": Bound(float, 0.5, 0.0, 10.0, "entropy to stop at, nats"),
    "fixed_budget": Bound(int, 256, 0, 1_000_000, "length of the reasoning, tokens"),
}


def check_values(
    values: Mapping[str, Any], bounds: Mapping[str, Bound], *, strict: bool = False
) -> dict[str, Any]:
    """The values given, as their parameters' types and within their ranges.

    Whole numbers may come as "8" or 8.0, others as "0.03", as command lines hand them on. A number
    out of range becomes the nearest end, with one warning (`RuntimeWarning` and log record) for
    each that names the parameter, both values and the range.

    Args:
        strict: refuse what is out of range.

    Raises:
        ScoreModeError: an unknown name, no number (a bool and NaN are none), a fraction for a
            whole number; with `strict` a number out of range. It lists all of them.
    """
    problems, corrections, checked = [], [], {}
    for name, value in values.items():
        bound = bounds.get(name)
        if bound is None:
            problems.append(f"{name} is no parameter{did_you_mean(name, bounds)}")
            continue
        number = _number(value, bound.kind)
        if number is None:
            wanted = "a whole number" if bound.kind is int else "a number"
            problems.append(f"{name} is {value!r}, set {wanted} from {bound.range}")
            continue
        inside = bound.kind(min(max(number, bound.low), bound.high))
        if inside != number and strict:
            problems.append(f"{name} is {value!r}, out of range, set it from {bound.range}")
        elif inside != number:
            corrections.append(
                f"{name} is {value!r}, out of its range {bound.range}; corrected to {inside!r}."
            )
        checked[name] = inside
    if problems:
        raise ScoreModeError(f"Reasoning cannot run with these parameters: {'; '.join(problems)}.")
    for message in corrections:
        logger.warning(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return checked


def did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    """The end of a sentence about an unknown name."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _default(name: str) -> Any:
    return BOUNDS[name].kind(BOUNDS[name].default)


@dataclass(frozen=True)
class EIGParameters:
    """The parameters of expected information gain reasoning; `BOUNDS` says what each one is.

    Raises:
        ScoreModeError: as `check_values` with `strict`. `EIGParameters.checked` corrects instead.
    """

    lambda_cost: float = _default("lambda_cost")
    beam_size: int = _default("beam_size")
    mc_samples: int = _default("mc_samples")
    sample_length: int = _default("sample_length")
    temperature: float = _default("temperature")
    top_p: float = _default("top_p")
    max_computation_time: float = _default("max_computation_time")

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in check_values(given, BOUNDS, strict=True).items():
            object.__setattr__(self, name, value)

    @classmethod
    def checked(cls, strict: bool = False, **values: Any) -> EIGParameters:
        """From values as users write them; see `check_values`."""
        return cls(**check_values(values, BOUNDS, strict=strict))

    def as_dict(self) -> dict[str, Any]:
        """Name to value."""
        return asdict(self)


def _number(value: Any, kind: type) -> int | float | None:
    """None where the value is no number of this kind. Infinity is a number out of range."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    if math.isnan(number) or (kind is int and not number.is_integer()):
        return None
    return int(number) if kind is int else number
