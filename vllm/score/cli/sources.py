"""Which text a command reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.score.data import Source, TextSource, file_source, hub_source, stdin_source
from vllm.score.errors import ScoreModeError

STANDARD_INPUT = "-"
_WAYS = "--file PATH (- for standard input), --dataset NAME or --text TEXT"


@dataclass(frozen=True)
class TextOptions:
    """The options that name a text, as given.

    Raises:
        ScoreModeError: on construction, for options that do not go together.
    """

    dataset: str | None
    dataset_config: str | None
    split: str | None
    text: str | None
    files: Sequence[str]
    text_column: str | None
    skip_empty: bool = False

    def __post_init__(self) -> None:
        named = [
            option
            for option, value in (
                ("--dataset", self.dataset),
                ("--text", self.text),
                ("--file", self.files or None),
            )
            if value is not None
        ]
        if len(named) > 1:
            raise ScoreModeError(f"{' and '.join(named)} each name a text; give one of them")
        for option, value in (("--dataset-config", self.dataset_config), ("--split", self.split)):
            if value is not None and self.dataset is None:
                raise ScoreModeError(
                    f"{option} is {value!r}, but no dataset is named; add --dataset NAME"
                )
        if STANDARD_INPUT in self.files and len(self.files) > 1:
            raise ScoreModeError("--file - (standard input) cannot be joined with other files")
        if self.text is not None or STANDARD_INPUT in self.files or not named:
            for given, what in (
                (self.text_column is not None, f"--text-column is {self.text_column!r}"),
                (self.skip_empty, "--skip-empty is given"),
            ):
                if given:
                    raise ScoreModeError(f"{what}, but the text has no columns; leave it out")

    @property
    def given(self) -> bool:
        return self.dataset is not None or self.text is not None or bool(self.files)

    def open(self) -> Source:
        """The text; of a dataset after loading it.

        Raises:
            ScoreModeError: none is named, or it is not there.
        """
        if self.text is not None:
            return TextSource(self.text, name="--text")
        if STANDARD_INPUT in self.files:
            return stdin_source()
        if self.files:
            return file_source(
                list(self.files), text_column=self.text_column, skip_empty=self.skip_empty
            )
        if self.dataset is not None:
            return hub_source(
                self.dataset,
                self.dataset_config,
                split=self.split or "test",
                text_column=self.text_column,
                skip_empty=self.skip_empty,
            )
        raise ScoreModeError(f"a model is named and no text; give {_WAYS}")
