"""Perplexities to read a model's figure against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Baseline:
    """The perplexity per token of a guess without the model, on the same tokens.

    name: a word, e.g. "uniform".
    meaning: what is guessed, in words.
    """

    name: str
    meaning: str
    perplexity: float
