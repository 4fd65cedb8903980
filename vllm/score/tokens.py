"""From texts, messages or ids to token ids, with the special tokens in front of a text once.

One rule for every way that a text comes in (`score`, perplexity, `SequenceProcessor`, expected
information gain reasoning, contexts of sequences, score requests of `LLM.generate` and the
server): what tokenizer(text) puts in front of any text (often a BOS) stands in front. A text that
begins with it already, as texts rendered by a chat template do, brings its own: nothing is put in
front of it.

Not under this rule: what says that it computes as another tool does (conventions of perplexity,
the lm-eval model, `echo` of the server).
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from vllm.score.errors import ScoreModeError


class TextTokens(NamedTuple):
    """The tokens of a text.

    Attributes:
        ids: special tokens included.
        own_prefix: the text begins with the special tokens itself.
    """

    ids: list[int]
    own_prefix: bool


def automatic_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that tokenizer(text) puts in front of a text by itself (often a BOS)."""
    return automatic_tokens(tokenizer)[0]


def automatic_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that tokenizer(text) adds by itself, in front of a text and behind it."""
    probe = "a"
    plain = list(tokenizer.encode(probe, add_special_tokens=False))
    full = list(tokenizer.encode(probe, add_special_tokens=True))
    for start in range(len(full) - len(plain) + 1):
        end = start + len(plain)
        if plain and full[start:end] == plain:
            return full[:start], full[end:]
    return [], []


def start_token(tokenizer: Any) -> int | None:
    """What a text without context follows: BOS, or EOS without one; None: there is neither."""
    ids = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((number for number in ids if number is not None), None)


def own_prefix_length(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """How many of a text's own first tokens are those of the prefix; any: it brings its own."""
    same = (own == expected for own, expected in zip(ids, prefix, strict=False))
    return sum(takewhile(bool, same))


def encode_inputs(
    tokenizer: Any,
    inputs: Sequence[Any],
    names: Sequence[str] | None = None,
    vocab_size: int | None = None,
) -> list[TextTokens]:
    """The tokens of texts, chat messages or token ids, in any mixture.

    A text has the tokens of tokenizer(text), but for a doubled prefix; messages those of the
    tokenizer's chat template, as `render_messages` says; ids stay as they are.

    Args:
        tokenizer: of Hugging Face or vLLM.
        inputs: each a text, a list of messages ({"role": ..., "content": ...}), or token ids.
        names: of the inputs, for errors; by default texts[i].
        vocab_size: V, for the check of ids; None: ids are refused.

    Raises:
        ScoreModeError: something else, a text with a lone surrogate, an id outside of the
            vocabulary, or a chat template that does not take the messages.
    """
    names = [f"texts[{i}]" for i in range(len(inputs))] if names is None else names
    found: dict[int, TextTokens] = {}
    texts: dict[int, str] = {}
    for i, (given, name) in enumerate(zip(inputs, names, strict=True)):
        if isinstance(given, str):
            check_encodable(given, name)
            texts[i] = given
        elif vocab_size is not None and is_token_ids(given):
            found[i] = TextTokens(read_token_ids(given, vocab_size, name).tolist(), False)
        else:
            text = render_messages(given, tokenizer, name)
            found[i] = TextTokens(list(tokenizer.encode(text, add_special_tokens=False)), False)
    if texts:
        prefix = automatic_prefix(tokenizer)
        encoded = tokenizer(list(texts.values()))["input_ids"]
        found.update((i, _once(ids, prefix)) for i, ids in zip(texts, encoded, strict=True))
    return [found[i] for i in range(len(inputs))]


def is_token_ids(given: Any) -> bool:
    """Whether something is meant as token ids: a list, array or tensor, and not of messages."""
    return hasattr(given, "tolist") or (
        _is_sequence(given) and len(given) > 0 and not isinstance(given[0], Mapping)
    )


def render_messages(given: Any, tokenizer: Any, name: str) -> str:
    """Messages as the text that the tokenizer's chat template makes of them.

    The template ends with what announces the assistant's answer, which a continuation then is;
    where the last message is the assistant's own, with that message, still open.

    Raises:
        ScoreModeError: no list of messages, or a template that does not take them. The sentence
            begins with `name`.
    """
    if isinstance(given, Mapping):
        raise ScoreModeError(f"{name} is one message; write a list of messages, [message].")
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes, bytearray)):
        raise ScoreModeError(
            f"{name} is {type(given).__name__}; give a text, or a list of messages such as "
            '{"role": "user", "content": "..."}.'
        )
    if not given:
        raise ScoreModeError(
            f"{name} has no messages and no token ids; give at least one, or a text."
        )
    for index, message in enumerate(given):
        if not isinstance(message, Mapping) or "role" not in message:
            raise ScoreModeError(
                f"{name}[{index}] is {message!r:.60}; give a message such as "
                '{"role": "user", "content": "..."}.'
            )
    unfinished = given[-1]["role"] == "assistant"
    options = {"add_generation_prompt": not unfinished, "continue_final_message": unfinished}

    def template(**more: Any) -> Any:
        return tokenizer.apply_chat_template(list(given), **options, **more)

    try:
        text = str(template(tokenize=False))
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            # Not every tokenizer reads its template's control tokens from text.
            ids = template(tokenize=True, return_dict=False)
            if list(ids) != list(tokenizer.encode(text, add_special_tokens=False)):
                raise ScoreModeError("its text, tokenised, is not the template's tokens")
    except Exception as error:  # Jinja's own kinds, and whatever a tokenizer's own code raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ScoreModeError(
            f"{name}: the chat template does not take these messages: {reason}; give a text, or a "
            "tokenizer with a chat template for them."
        ) from error
    return text


def prefix_once(tokenizer: Any, text: str, ids: Sequence[int]) -> TextTokens:
    """The same of a text that somebody else has tokenised to `ids`, perhaps without a prefix."""
    found = _once(list(ids), automatic_prefix(tokenizer))
    # Two prefixes may stand in the text, and none have been added.
    if found.own_prefix and list(ids) == list(tokenizer.encode(text, add_special_tokens=False)):
        return TextTokens(list(ids), False)
    return found


def own_prefix_note(tokenizer: Any) -> str:
    """What to say of a text that brings its own prefix."""
    token = tokenizer.decode(automatic_prefix(tokenizer)[:1])
    return f"the text begins with {token!r} itself: it is context, and none was put in front"


def check_encodable(text: str, name: str) -> bytes:
    """The text in UTF-8.

    Args:
        name: for the error.

    Raises:
        ScoreModeError: it has a lone surrogate.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ScoreModeError(
            f"{name} has a lone surrogate ({text[error.start]!r}), which is no character and has "
            "no UTF-8 form; remove or replace it"
        ) from None


def _once(ids: list[int], prefix: list[int]) -> TextTokens:
    size = len(prefix)
    if ids[:size] == prefix and own_prefix_length(ids[size:], prefix):
        return TextTokens(ids[size:], True)
    return TextTokens(ids, False)


def read_token_ids(given: Any, vocab_size: int, field: str) -> np.ndarray:
    """Checked token ids, int64 [n].

    Args:
        given: whole numbers as a list, tuple, array or tensor; truth values and floats are refused,
            whatever they are equal to.
        vocab_size: V.
        field: for errors.

    Raises:
        ScoreModeError: no flat list of token ids of the vocabulary.
    """
    given = _sequence(given, field, "a list of token ids")
    ids = _whole_numbers(given)
    if ids is None or (len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size):
        # One by one, which names the first that is wrong.
        each = [_token_id(value, vocab_size, field, i) for i, value in enumerate(given)]
        ids = np.array(each, dtype=np.int64)
    return ids


def read_token_id_rows(given: Any, vocab_size: int, field: str) -> np.ndarray:
    """Checked token ids, int64 [m] or [m, k].

    Raises:
        ScoreModeError: neither a flat list of token ids nor lists of equal length.
    """
    what = "a list of token ids, or a list of lists for several candidates per position"
    given = _sequence(given, field, what)
    if not len(given) or not _is_sequence(_listed(given[0])):
        return read_token_ids(given, vocab_size, field)
    rows = [_sequence(row, f"{field}[{i}]", "a list of token ids") for i, row in enumerate(given)]
    widths = sorted(set(map(len, rows)))
    if len(widths) > 1 or widths == [0]:
        raise ScoreModeError(
            f"{field} must have the same number of candidates at every position, k of at least 1, "
            f"got rows of {widths} candidates."
        )
    matrix = isinstance(given, np.ndarray) and given.ndim == 2
    ids = _whole_numbers(given.ravel() if matrix else list(chain.from_iterable(rows)))
    if ids is None or not 0 <= ids.min() <= ids.max() < vocab_size:
        each = [read_token_ids(row, vocab_size, f"{field}[{i}]") for i, row in enumerate(rows)]
        ids = np.stack(each)
    return ids.reshape(len(rows), widths[0])


def _sequence(given: Any, field: str, what: str) -> Any:
    """A sequence or an array with a dimension; tensors and their like as lists."""
    if not isinstance(given, np.ndarray) or given.ndim == 0 or given.dtype == object:
        given = _listed(given)
    if not _is_sequence(given):
        raise ScoreModeError(f"{field} must be {what}, got {type(given).__name__}.")
    return given


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_sequence(value: Any) -> bool:
    texts = (str, bytes, bytearray, memoryview)
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, texts)


def _whole_numbers(given: Any) -> np.ndarray | None:
    """Int64 [n] where all are plain whole numbers; None: they have to be looked at one by one."""
    if isinstance(given, np.ndarray):
        return given.astype(np.int64) if given.ndim == 1 and given.dtype.kind in "iu" else None
    kinds = set(map(type, given))
    if bool in kinds or not all(issubclass(kind, Integral) for kind in kinds):
        return None
    try:
        return np.frombuffer(array("q", given), dtype=np.int64)  # 3 times as fast as NumPy's
    except OverflowError:
        return None


def _token_id(value: Any, vocab_size: int, field: str, place: int) -> int:
    """A checked token id, the element `place` of `field`."""
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ScoreModeError(f"{field} must be integers, got {value!r:.60} at [{place}].") from None
    if not 0 <= number < vocab_size:
        raise ScoreModeError(
            f"{field}[{place}] is {number}, outside the vocabulary 0..{vocab_size - 1}."
        )
    return number
