"""From what callers give to tokens: everything that can be refused without an engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.score.errors import ScoreModeError
from vllm.score.sequence.boundary import BoundaryTokenizer, Pair, SplitTokens
from vllm.score.sequence.contexts import Context, ContextLike, read_context


@dataclass(frozen=True)
class Prepared:
    """Pairs ready to be scored, in order.

    Attributes:
        contexts: [n], as given.
        sequences: [n].
        names: [n], for errors.
        splits: [n].
    """

    contexts: list[ContextLike]
    sequences: list[str]
    names: list[str]
    splits: list[SplitTokens]

    def check_length(self, longest: int, what: str) -> None:
        """Raise ScoreModeError for a pair of more tokens than `longest`, which is `what`'s."""
        for name, split in zip(self.names, self.splits, strict=True):
            if len(split.token_ids) > longest:
                raise ScoreModeError(
                    f"{name}: {len(split.token_ids)} tokens together, {what} is {longest}; "
                    "shorten the context."
                )

    def check_vocabulary(self, size: int) -> None:
        """Raise ScoreModeError for a token id that the model does not have."""
        for name, split in zip(self.names, self.splits, strict=True):
            if (largest := max(split.token_ids)) >= size:
                raise ScoreModeError(
                    f"{name}: token id {largest} is outside the model's vocabulary of {size}; "
                    "give the tokenizer that belongs to the model."
                )


def prepare_product(
    contexts: Sequence[ContextLike], sequences: Sequence[str], tokenizer: Any, boundary: str
) -> Prepared:
    """Every sequence after every context; all sequences of the first context first.

    Raises:
        ScoreModeError: an argument cannot be used; contexts[i] or target_sequences[j] is named.
    """
    for field, value in (("contexts", contexts), ("target_sequences", sequences)):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise ScoreModeError(
                f"{field} must be a list, got one {type(value).__name__}; write [{field}]."
            )
    read = [read_context(given, tokenizer, f"contexts[{i}]") for i, given in enumerate(contexts)]
    for j, sequence in enumerate(sequences):
        _check_text(f"target_sequences[{j}]", sequence)
    named = (
        (f"contexts[{i}], target_sequences[{j}]", context, sequence)
        for i, context in enumerate(read)
        for j, sequence in enumerate(sequences)
    )
    return _prepare(named, tokenizer, boundary)


def prepare_pairs(
    pairs: Iterable[Sequence[Any]],
    tokenizer: Any,
    boundary: str,
    names: Sequence[str] | None = None,
) -> Prepared:
    """(context, sequence) pairs.

    Args:
        names: of the pairs, for errors; by default pairs[i].

    Raises:
        ScoreModeError: a pair cannot be used; it is named.
    """

    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ScoreModeError(
            f"pairs is {type(pairs).__name__}; give a list of (context, sequence) pairs."
        )

    def named() -> Iterable[tuple[str, Context, str]]:
        previous: Context | None = None
        for i, pair in enumerate(pairs):
            label = f"pairs[{i}]" if names is None else names[i]
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ScoreModeError(f"{label} is {pair!r:.60}; give (context, sequence).")
            given, sequence = pair
            if previous is None or previous.given != given:
                previous = read_context(given, tokenizer, f"{label}, context")
            _check_text(f"{label}, sequence", sequence)
            yield label, previous, sequence

    return _prepare(named(), tokenizer, boundary)


def _prepare(named: Iterable[tuple[str, Context, str]], tokenizer: Any, boundary: str) -> Prepared:
    prepared = Prepared([], [], [], [])

    def pairs() -> Iterable[Pair]:
        for name, context, sequence in named:
            prepared.contexts.append(context.given)
            prepared.sequences.append(sequence)
            prepared.names.append(name)
            yield Pair(context.text, sequence, context.templated, name)

    prepared.splits.extend(BoundaryTokenizer(tokenizer, boundary).split(pairs()))
    return prepared


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ScoreModeError(f"{field} is {type(value).__name__}; give a text.")
