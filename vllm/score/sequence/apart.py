"""Tokens of a continuation by itself, without the space that many tokenizers put before a text."""

from __future__ import annotations

import json
from typing import Any

from vllm.score.data.token_bytes import TokenBytes
from vllm.score.errors import ScoreModeError

# Put before the text where the tokenizer has no switch. The first is in hardly any vocabulary and
# becomes bytes, which never merge with others; the rest serves where there are no bytes.
_ANCHORS = ("\ue000", "\n", ".", "|", "0", "a")


class ApartEncoder:
    """Tokenises texts that are read in the middle of another one.

    Args:
        tokenizer: of Hugging Face or vLLM.
    """

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes) -> None:
        self._tokenizer, self._bytes = tokenizer, token_bytes
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._bare: Any = None
        if token_bytes.dummy and backend is not None:
            bare = _without_dummy(backend)
            first = bare.encode("a", add_special_tokens=False).ids[:1]
            if not any(token_bytes(token).startswith(b" ") for token in first):
                self._bare = bare

    def encode(self, text: str, context: str, context_ids: list[int], name: str) -> list[int]:
        """Token ids of `text`.

        Args:
            context: what it follows. If that is nothing, the text begins with the tokenizer's
                space; behind a special token it may, as the tokenizer has it.
            context_ids: tokens of the context.
            name: for errors.

        Raises:
            ScoreModeError: the tokenizer's space cannot be kept away.
        """
        if not self._bytes.dummy or not context_ids:
            return self._encode(text)
        special = self._bytes.added.get(context_ids[-1])
        if special is not None and context.rstrip().endswith(special.content):
            behind = self._encode(special.content + text)
            if behind[:1] == context_ids[-1:]:
                return behind[1:]
        if self._bare is not None:
            return self._bare_ids(text)
        return self._behind_anchor(text, name)

    def _bare_ids(self, text: str) -> list[int]:
        """Behind a special token inside of the text, the tokenizer's own reading stands."""
        found = self._bare.encode(text, add_special_tokens=False)
        for index, (token, (start, end)) in enumerate(zip(found.ids, found.offsets, strict=True)):
            added = self._bytes.added.get(token)
            if added is not None and text[start:end].strip() == added.content:
                return [*found.ids[:index], *self._encode(text[start:])]
        return list(found.ids)

    def _behind_anchor(self, text: str, name: str) -> list[int]:
        """Whatever merges with the anchor shows, as the anchor's own tokens are then gone."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        for anchor in _ANCHORS:
            alone, both = self._encode(anchor), self._encode(anchor + text)
            if alone and alone[-1] != unknown and both[: len(alone)] == alone:
                return both[len(alone) :]
        raise ScoreModeError(
            f"{name}: boundary='separate' does not work with this tokenizer "
            f"({type(self._tokenizer).__name__}), which puts a space that cannot be kept away "
            f"before the continuation {text[:40]!r}; use boundary='spanning'."
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def _without_dummy(backend: Any) -> Any:
    """A copy of a fast tokenizer that puts no space before a text."""
    settings = json.loads(backend.to_str())
    for step in ("normalizer", "pre_tokenizer"):
        settings[step] = _stripped(settings[step])
    copy = type(backend).from_str(json.dumps(settings))
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _stripped(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer, as `tokenizers` writes it, without what adds the space."""
    kind = None if step is None else step["type"]
    if step is None or kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**step, "add_prefix_space": False}
    parts: dict[str, Any] = {
        key: [part for part in map(_stripped, step[key]) if part is not None]
        for key in ("normalizers", "pretokenizers")
        if key in step
    }
    return {**step, **parts}
