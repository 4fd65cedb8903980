"""Which pairs of context and target a command scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import RULES
from vllm.score.sequence.files import read_pairs

if TYPE_CHECKING:
    from vllm.score.sequence.prepare import Prepared


@dataclass(frozen=True)
class PairOptions:
    """The options that name pairs, as given.

    Raises:
        ScoreModeError: on construction, for options that do not go together.
    """

    contexts: Sequence[str]
    targets: Sequence[str]
    file: Path | None
    context_column: str | None
    target_column: str | None
    chat: bool
    boundary: str

    def __post_init__(self) -> None:
        if self.boundary not in RULES:
            raise ScoreModeError(
                f"--boundary is {self.boundary!r}; it must be one of {', '.join(RULES)}"
            )
        if self.file is not None:
            if self.contexts or self.targets:
                raise ScoreModeError(
                    "--file and --context or --target each name pairs; give one of them"
                )
            return
        for option, column in (
            ("--context-column", self.context_column),
            ("--target-column", self.target_column),
        ):
            if column is not None:
                raise ScoreModeError(
                    f"{option} is {column!r}, but no file is named; add --file PATH"
                )
        if not self.contexts and not self.targets:
            raise ScoreModeError(
                "nothing to score; give --context TEXT --target TEXT, or --file PATH"
            )
        if not self.contexts:
            raise ScoreModeError(
                "--target is given without --context; add one (--context '' for none)"
            )
        if not self.targets:
            raise ScoreModeError("--context is given without --target; add one")

    def read(self) -> Pairs:
        """The pairs; of a file after reading it.

        Raises:
            ScoreModeError: the file is not there, or holds no pairs.
        """
        if self.file is None:
            rows: list[tuple[Any, str]] = list(product(self.contexts, self.targets))
            names = [f"--context {c[:30]!r}, --target {t[:30]!r}" for c, t in rows]
        else:
            rows = read_pairs(
                self.file,
                "context" if self.context_column is None else self.context_column,
                "target" if self.target_column is None else self.target_column,
            )
            names = [f"{self.file}, row {number}" for number in range(1, len(rows) + 1)]
        if self.chat:
            rows = [(_as_messages(context), target) for context, target in rows]
        return Pairs(rows, names, self.boundary)


@dataclass(frozen=True)
class Pairs:
    """(context, target) rows, what errors call them, and the boundary rule."""

    rows: Sequence[tuple[Any, str]]
    names: Sequence[str]
    boundary: str

    def prepare(self, tokenizer: Any) -> Prepared:
        """Their tokens.

        Raises:
            ScoreModeError: a pair that cannot be scored.
        """
        from vllm.score.sequence.prepare import prepare_pairs

        return prepare_pairs(self.rows, tokenizer, self.boundary, self.names)


def _as_messages(context: Any) -> Any:
    return [{"role": "user", "content": context}] if isinstance(context, str) else context
