"""Token ids as callers give them: lists, tuples, arrays or tensors of whole numbers."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vllm.score.engine.invalid import InvalidScoreRequest


def read_token_ids(given: Any, vocab_size: int, field: str) -> np.ndarray:
    """Checked token ids, int64 [n].

    Args:
        given: whole numbers; truth values and floats are refused, whatever they are equal to.
        vocab_size: V.
        field: for errors.

    Raises:
        InvalidScoreRequest: no flat list of token ids of the vocabulary.
    """
    given = as_sequence(given, field, "a list of token ids")
    try:
        # Three times as fast as NumPy on a list, and it refuses what is no integer.
        ids = np.frombuffer(array("q", given), dtype=np.int64)
    except (TypeError, OverflowError):
        raise _no_id(enumerate(given), vocab_size, field) from None
    _check(ids, given, vocab_size, field)
    return ids


def read_token_id_rows(given: Any, vocab_size: int, field: str) -> np.ndarray:
    """Checked token ids, int64 [m] or [m, k].

    Raises:
        InvalidScoreRequest: neither a flat list of token ids nor lists of equal length.
    """
    what = "a list of token ids, or a list of lists for several candidates a position"
    given = as_sequence(given, field, what)
    try:
        ids = np.asarray(given)
    except (ValueError, TypeError, OverflowError):
        ids = np.asarray(None)
    if ids.dtype == object:
        widths = sorted({len(row) if _is_sequence(row) else 1 for row in given})
        if len(widths) > 1:
            raise InvalidScoreRequest(
                f"{field} must have the same number of candidates at every position, got "
                f"rows of {widths} candidates.",
                parameter=field,
            )
        raise _no_id(_elements(given), vocab_size, field)
    if ids.ndim > 2 or ids.shape[1:] == (0,):
        raise InvalidScoreRequest(
            f"{field} must be [m] or [m, k] with k of at least 1, got the shape {ids.shape}.",
            parameter=field,
        )
    _check(ids, given, vocab_size, field)
    return ids.astype(np.int64)


def as_sequence(given: Any, field: str, what: str) -> Any:
    """A sequence or an array with a dimension; tensors and their like as lists.

    Raises:
        InvalidScoreRequest: something else; `what` says what the field must be.
    """
    if not isinstance(given, np.ndarray) or given.ndim == 0 or given.dtype == object:
        given = _listed(given)
    if not _is_sequence(given):
        raise InvalidScoreRequest(
            f"{field} must be {what}, got {type(given).__name__}.", parameter=field
        )
    return given


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_sequence(value: Any) -> bool:
    texts = (str, bytes, bytearray, memoryview)
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, texts)


def _check(ids: np.ndarray, given: Any, vocab_size: int, field: str) -> None:
    if ids.dtype.kind not in "iu":
        raise _no_id(_elements(given), vocab_size, field)
    # Among integers a truth value has become 0 or 1.
    if ids is not given:
        for where in np.argwhere(ids < 2).tolist():
            value = given
            for i in where:
                value = value[i]
            if _is_truth_value(value):
                raise _no_integer(where, value, field)
    wrong = (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        raise _outside(np.argwhere(wrong)[0], ids[wrong][0], vocab_size, field)


def _elements(given: Any) -> Iterator[tuple[Any, Any]]:
    """(index, element) of a list, or of its lists where it has them."""
    rows = [_listed(row) for row in given]
    if not any(map(_is_sequence, rows)):
        yield from enumerate(rows)
        return
    for i, row in enumerate(rows):
        if not _is_sequence(row):
            yield i, row
        else:
            yield from (((i, j), value) for j, value in enumerate(row))


def _no_id(elements: Iterable[tuple[Any, Any]], vocab_size: int, field: str) -> InvalidScoreRequest:
    """The error that names the first element that is no token id."""
    for where, value in elements:
        try:
            number = operator.index(value)
        except TypeError:
            return _no_integer(where, value, field)
        if _is_truth_value(value):
            return _no_integer(where, value, field)
        if not 0 <= number < vocab_size:
            return _outside(where, number, vocab_size, field)
    return InvalidScoreRequest(
        f"{field} must be integers: give a list, an array or a tensor of them.", parameter=field
    )


def _is_truth_value(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) == "torch.bool"


def _no_integer(where: Any, value: Any, field: str) -> InvalidScoreRequest:
    return InvalidScoreRequest(
        f"{field} must be integers, got {value!r:.60} at {_place(where)}.",
        parameter=field,
        value=value,
    )


def _outside(where: Any, value: Any, vocab_size: int, field: str) -> InvalidScoreRequest:
    return InvalidScoreRequest(
        f"{field}{_place(where)} is {int(value)}, outside the vocabulary 0..{vocab_size - 1}.",
        parameter=field,
        value=int(value),
    )


def _place(where: Any) -> str:
    return "".join(f"[{i}]" for i in np.atleast_1d(where).tolist())
