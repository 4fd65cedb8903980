"""Which pairs of context and target a command scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.cli.checks import check_no_file
from vllm.score.data.rows import Skipped
from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import RULES
from vllm.score.sequence.table import read_pairs

if TYPE_CHECKING:
    from vllm.score.sequence.scorer import Prepared


@dataclass(frozen=True)
class PairOptions:
    """The options that name pairs, as given.

    Raises:
        ScoreModeError: on construction, for options that do not go together.
    """

    contexts: Sequence[str]
    targets: Sequence[str]
    files: Sequence[Path]
    context_column: str | None
    target_column: str | None
    chat: bool
    boundary: str
    skip_empty: bool = False

    def __post_init__(self) -> None:
        if self.boundary not in RULES:
            raise ScoreModeError(
                f"--boundary is {self.boundary!r}; it must be one of {', '.join(RULES)}"
            )
        if self.files:
            if self.contexts or self.targets:
                raise ScoreModeError(
                    "--file and --context or --target each name pairs; give one of them"
                )
            return
        check_no_file(
            context_column=self.context_column,
            target_column=self.target_column,
            skip_empty=self.skip_empty or None,
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
        notes: list[str] = []
        if not self.files:
            rows: list[tuple[Any, str]] = list(product(self.contexts, self.targets))
            names = [f"--context {c[:30]!r}, --target {t[:30]!r}" for c, t in rows]
        else:
            target = "target" if self.target_column is None else self.target_column
            skipped = Skipped((target,)) if self.skip_empty else None
            rows, names = read_pairs(
                self.files,
                "context" if self.context_column is None else self.context_column,
                target,
                skipped=skipped,
            )
            notes = [] if skipped is None else skipped.notes()
        if self.chat:
            rows = [(_as_messages(context), target) for context, target in rows]
        return Pairs(rows, names, self.boundary, notes)


@dataclass(frozen=True)
class Pairs:
    """(context, target) rows, what errors call them, the boundary rule, and what the reader of
    the results should know of the files."""

    rows: Sequence[tuple[Any, str]]
    names: Sequence[str]
    boundary: str
    notes: Sequence[str] = ()

    def prepare(self, tokenizer: Any) -> Prepared:
        """Their tokens.

        Raises:
            ScoreModeError: a pair that cannot be scored.
        """
        from vllm.score.sequence.scorer import prepare_pairs

        return prepare_pairs(self.rows, tokenizer, self.boundary, self.names)


def _as_messages(context: Any) -> Any:
    return [{"role": "user", "content": context}] if isinstance(context, str) else context
