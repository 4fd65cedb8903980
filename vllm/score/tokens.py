"""From texts to token ids: the special tokens in front of a text, once.

One rule for every way that a text comes in (`score`, perplexity, `SequenceProcessor`, expected
information gain reasoning, contexts of sequences, score requests of `LLM.generate` and the
server): what tokenizer(text) puts in front of any text (often a BOS) stands in front. A text that
begins with it already, as texts rendered by a chat template do, brings its own: nothing is put in
front of it.

Not under this rule: what says that it computes as another tool does (conventions of perplexity,
the lm-eval model, `echo` of the server).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


def begins_with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    """Whether a text's own tokens bring the prefix: begin with the first token of it."""
    return bool(prefix) and bool(len(ids)) and ids[0] == prefix[0]


def own_prefix_length(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """How many of a text's own first tokens are those of the prefix."""
    length = 0
    for own, expected in zip(ids, prefix, strict=False):
        if own != expected:
            break
        length += 1
    return length


def encode_texts(
    tokenizer: Any, texts: Sequence[str], names: Sequence[str] | None = None
) -> list[TextTokens]:
    """The tokens of each text, as tokenizer(text) has them but for a doubled prefix.

    Args:
        names: of the texts, for errors; by default texts[i].

    Raises:
        ScoreModeError: a text with a lone surrogate.
    """
    if not texts:
        return []
    for i, text in enumerate(texts):
        check_encodable(text, f"texts[{i}]" if names is None else names[i])
    prefix = automatic_prefix(tokenizer)
    return [_once(ids, prefix) for ids in tokenizer(list(texts))["input_ids"]]


def prefix_once(tokenizer: Any, text: str, ids: Sequence[int]) -> TextTokens:
    """The same for a text that somebody else has tokenised to `ids`, perhaps without a prefix."""
    prefix = automatic_prefix(tokenizer)
    found = _once(list(ids), prefix)
    if not found.own_prefix:
        return found
    # Two prefixes may stand in the text, and none have been added.
    written = list(tokenizer.encode(text, add_special_tokens=False))
    return TextTokens(list(ids), False) if list(ids) == written else found


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
    if ids[:size] == prefix and begins_with_prefix(ids[size:], prefix):
        return TextTokens(ids[size:], True)
    return TextTokens(ids, False)
