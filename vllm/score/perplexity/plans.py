"""What is scored: how documents are joined, what stands in front, and which windows are cut."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.perplexity.windows import WindowPlan
from vllm.score.tokens import automatic_prefix

BOS_RULES = {
    "auto": "what tokenizer(text) itself puts in front of the text",
    "start": "a BOS in front of the text, whatever the tokenizer does by itself",
    "window": "a BOS in front of every window (models that cannot do without one, as Gemma)",
    "never": "nothing in front of the text",
}


@dataclass(frozen=True)
class AddedTokens:
    """Tokens that are added to each text and scored like its own.

    before, after: token ids.
    unless_begun: texts that begin with these characters get none.
    if_empty: an empty text gets them, too.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    unless_begun: str | None = None
    if_empty: bool = True

    def __bool__(self) -> bool:
        return bool(self.before or self.after)


@dataclass(frozen=True)
class ScoringPlan:
    """A complete description of the prompts of a run. Equal plans send equal prompts.

    windows: the window plan.
    separator: joins the documents into one text; None: each document stands alone.
    prefix: tokens in front of each text, context only.
    added: tokens of each text that a tool's tokenizer adds and the tool scores.
    every_window: tokens in front of each window, context only.
    replace_first: token in the place of each window's first one.
    prefix_once: a text that begins with the prefix itself gets none (`vllm.score.tokens`).
        Conventions double it as their tools do.
    """

    windows: WindowPlan
    separator: str | None = "\n\n"
    prefix: tuple[int, ...] = ()
    every_window: tuple[int, ...] = ()
    replace_first: int | None = None
    prefix_once: bool = False
    added: AddedTokens = AddedTokens()

    def describe(self) -> dict[str, Any]:
        """The plan as plain values."""
        added = {"added": asdict(self.added)} if self.added else {}
        return {
            **self.windows.describe(),
            "separator": self.separator,
            "prefix": list(self.prefix),
            "every_window": list(self.every_window),
            "replace_first": self.replace_first,
            **({"prefix_once": True} if self.prefix_once else {}),
            **added,
        }

    def key(self) -> str:
        """Short name of the plan for files: equal for equal plans."""
        text = json.dumps(self.describe(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def join_documents(
    pieces: Iterable[tuple[int, str]], separator: str | None
) -> Iterator[tuple[int, str]]:
    """Documents as one text with `separator` between them, or as they are (None)."""
    if separator is None:
        yield from pieces
        return
    previous: int | None = None
    for document, text in pieces:
        if previous is not None and document != previous:
            yield 0, separator
        previous = document
        yield 0, text


def bos_tokens(rule: str, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The BOS rule as (tokens in front of the text, tokens in front of every window).

    Raises:
        ScoreModeError: for an unknown rule, or a tokenizer without a BOS where one is needed.
    """
    if rule not in BOS_RULES:
        known = "; ".join(f"{name!r}: {meaning}" for name, meaning in BOS_RULES.items())
        raise ScoreModeError(f"bos is {rule!r}; it must be one of {known}")
    if rule == "never":
        return (), ()
    if rule == "auto":
        return tuple(automatic_prefix(tokenizer)), ()
    bos = bos_token_id(tokenizer)
    return ((bos,), ()) if rule == "start" else ((), (bos,))


def bos_token_id(tokenizer: Any) -> int:
    """The tokenizer's BOS. Raises ScoreModeError where it has none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        raise ScoreModeError(
            "bos asks for a BOS token, but the model's tokenizer has none; use bos='never'"
        )
    return int(bos)


def describe_bos(plan: ScoringPlan) -> str:
    """What stands in front, in words."""
    if plan.replace_first is not None:
        return f"token {plan.replace_first} in the place of each window's first"
    if plan.every_window:
        return f"{_tokens(plan.every_window)} in front of every window"
    what = "the text" if plan.separator is not None else "each document"
    found = [f"{_tokens(plan.prefix)} in front of {what}"] if plan.prefix else []
    if plan.added.before:
        found.append(f"{_tokens(plan.added.before)} at its start, scored")
    if plan.added.after:
        found.append(f"{_tokens(plan.added.after)} at its end, scored")
    return ", ".join(found) or "none"


def _tokens(ids: tuple[int, ...]) -> str:
    return ("token " if len(ids) == 1 else "tokens ") + ", ".join(map(str, ids))
