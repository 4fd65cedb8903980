"""One check of values, ranges and names; pydantic does it, the errors are sentences of ours.

`Count`, `Whole`, `Number`, `Fraction`, `Seed` and `Flag` are types to annotate fields with, alone
or narrowed by `Annotated[Whole, Field(ge=0, le=20)]`. `check` looks at one value, `settings` makes
a dataclass that looks at its fields, `check_name` at a name among known ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as fields_of
from functools import cache
from numbers import Integral, Real
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.fields import FieldInfo

from vllm.score.errors import ScoreModeError

C = TypeVar("C", bound=type)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are Integral
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError
    return float(value)


Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[Whole, Field(ge=1)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
Seed = Annotated[Whole, Field(ge=0, lt=1 << 63)]
Flag = Annotated[bool, Strict()]

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    dict: "a dict",
    list: "a list",
}


def check(field: str, value: Any, kind: Any, remedy: str = "") -> Any:
    """`value` as `kind` has it, e.g. NumPy's 3 as int 3 for `Count`.

    Args:
        field: name of the value for the error.
        kind: an annotation, e.g. `Count | None`.
        remedy: end of the error's sentence, e.g. "set do_sample=False for greedy generation".

    Raises:
        ScoreModeError: the value is not of that kind.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError:
        raise ScoreModeError(_sentence(field, value, kind, remedy)) from None


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def settings(cls: C) -> C:
    """A frozen dataclass, keyword arguments only, whose fields are checked when it is made.

    Fields are annotated with the types above; `Field(description=...)` says what a field means. All
    that is wrong is one ScoreModeError, an unknown field with "did you mean".
    """
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    made: Any = pydantic_dataclass(cls, frozen=True, kw_only=True, config=config)
    validated: Callable[..., None] = made.__init__

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        try:
            validated(self, *args, **values)
        except ValidationError as error:
            raise ScoreModeError(_problems(made, error)) from None

    made.__init__ = __init__
    return made


def check_list(field: str, given: Any, kind: type = Sequence) -> None:
    """Raise ScoreModeError for one thing where a list of them is wanted.

    Args:
        kind: what counts as a list.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, kind):
        raise ScoreModeError(
            f"{field} must be a list, got one {type(given).__name__}; write [{field}]."
        )


def check_name(what: str, name: Any, known: Iterable[str], cutoff: float = 0.6) -> None:
    """Raise ScoreModeError for a name that is not among `known`: it names the nearest.

    Args:
        what: what is named, e.g. "convention" or "statistic".
        cutoff: similarity from which a known name is suggested, 0 to 1.
    """
    known = list(known)
    if name not in known:
        raise ScoreModeError(f"{what} {name!r} is unknown{did_you_mean(name, known, cutoff)}.")


def did_you_mean(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """End of a sentence about an unknown name: the nearest known one, and all of them if few."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=cutoff)
    listed = f"; there are {', '.join(known)}" if len(known) <= 30 else ""
    return (f" (did you mean {close[0]!r}?)" if close else "") + listed


def describe(kind: Any) -> str:
    """An annotation in words, e.g. "a whole number from 1 to 20"."""
    if isinstance(kind, FieldInfo):
        kind = kind.rebuild_annotation()
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = _limits(kind)
        return f"{describe(parts[0])} {limits}" if limits else describe(parts[0])
    if origin is list:
        return f"a list, each entry {describe(parts[0])}"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if parts and (origin is Union or type(None) in parts):
        return " or ".join(describe(part) for part in parts)
    if kind is type(None):
        return "None"
    return _WORDS.get(origin or kind, str(getattr(kind, "__name__", kind)))


def limits_of(kind: Any) -> dict[str, float]:
    """The limits of an annotation: `ge`, `gt`, `le`, `lt`, as far as it has them."""
    found: dict[str, float] = {}
    for part in getattr(kind, "__metadata__", ()):
        for rule in part.metadata if isinstance(part, FieldInfo) else (part,):
            for name in ("ge", "gt", "le", "lt"):
                limit = getattr(rule, name, None)
                if limit is not None:
                    found[name] = limit
    return found


def _limits(kind: Any) -> str:
    at = limits_of(kind)
    if at.keys() >= {"ge", "le"}:
        return f"from {at['ge']:,.10g} to {at['le']:,.10g}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    said = {1 << 63: "2**63"}
    return " and ".join(
        f"{words[name]} {said.get(limit) or f'{limit:,.10g}'}"  # type: ignore[call-overload]
        for name, limit in at.items()
    )


def _sentence(field: str, value: Any, kind: Any, remedy: str = "") -> str:
    said = repr(value)
    said = said if len(said) <= 200 else f"{said[:200]}..."
    return f"{field} must be {describe(kind)}, got {said}{'; ' + remedy if remedy else ''}."


def _problems(cls: Any, error: ValidationError) -> str:
    kinds, names = get_type_hints(cls, include_extras=True), [f.name for f in fields_of(cls)]
    said = []
    for problem in error.errors(include_url=False):
        field = str(problem["loc"][0]) if problem["loc"] else cls.__name__
        if problem["type"] == "unexpected_keyword_argument":
            said.append(f"{cls.__name__} has no {field}{did_you_mean(field, names)}")
        elif problem["type"] == "missing":
            said.append(f"{field} is missing: {cls.__name__} needs {describe(kinds[field])}")
        elif isinstance(reason := problem.get("ctx", {}).get("error"), ScoreModeError):
            said.append(str(reason).removesuffix("."))
        else:
            said.append(_sentence(field, problem["input"], kinds.get(field, cls)).removesuffix("."))
    return "; ".join(dict.fromkeys(said)) + "."


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
