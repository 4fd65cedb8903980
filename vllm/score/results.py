"""What a score request gives back: float32 arrays, and a stock-looking view built on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from vllm.logprobs import Logprob


@dataclass(frozen=True, eq=False, repr=False)
class TokenScores:
    """The scores of one request; m positions, k candidates each, V tokens in the vocabulary.

    Attributes:
        token_ids: int64 [m], or [m, k]; the scored tokens. None when the whole vocabulary was
            asked for: then column j is token j.
        logprobs: float32 [m], [m, k] or [m, V]; log-probabilities in nats.
        statistics: by name, float32 [m] (`rank` and `argmax`: int64 [m]), see
            `vllm.score.ops.statistics`.
        start: prompt position of the first scored token; row i scores position start + i.
        top_token_ids: int64 [m, top], the most likely tokens, first the likeliest; None unless
            `prompt_logprobs` asked for them.
        top_logprobs: float32 [m, top], their log-probabilities.
        notes: sentences for whoever reads the scores, e.g. that the text brought its own BOS.
    """

    token_ids: np.ndarray | None
    logprobs: np.ndarray
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    start: int = 1
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of scored positions, m."""
        return len(self.logprobs)

    def sum(self) -> float:
        """Log-probability of all scored tokens together, in nats, added up in float64.

        Raises:
            ValueError: several candidates per position, or the whole vocabulary: there is no one
                sequence to add up.
        """
        if self.logprobs.ndim != 1:
            raise ValueError(
                f"logprobs has the shape {self.logprobs.shape}: choose one candidate per position "
                "before adding up."
            )
        return float(self.logprobs.sum(dtype=np.float64))

    def to_pandas(self) -> pandas.DataFrame:
        """The scores as a `pandas.DataFrame`, one row per scored token.

        Columns: `position` (in the prompt), `token_id`, `logprob` (nats), one for each statistic,
        and `top_token_id_1`, `top_logprob_1`, ... from the likeliest token on. Several candidates
        of a position, or the V tokens of a whole vocabulary, are a row each.

        Raises:
            ScoreModeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ScoreModeError("to_pandas() needs pandas: pip install pandas.") from error
        logprobs = self.logprobs if self.logprobs.ndim == 2 else self.logprobs[:, None]
        rows, width = logprobs.shape
        ids = np.arange(width) if self.token_ids is None else self.token_ids.reshape(rows, width)
        columns = {
            "position": np.repeat(self.start + np.arange(rows), width),
            "token_id": np.broadcast_to(ids, logprobs.shape).ravel(),
            "logprob": logprobs.ravel(),
        }
        per_position = dict(self.statistics)
        if self.top_token_ids is not None and self.top_logprobs is not None:
            for i in range(self.top_token_ids.shape[1]):
                per_position[f"top_token_id_{i + 1}"] = self.top_token_ids[:, i]
                per_position[f"top_logprob_{i + 1}"] = self.top_logprobs[:, i]
        columns |= {name: np.repeat(values, width) for name, values in per_position.items()}
        return pandas.DataFrame(columns)

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.4f}" for value in self.logprobs.flat[:4])
        more = ", ..." if self.logprobs.size > 4 else ""
        total = f", sum={self.sum():.4f}" if self.logprobs.ndim == 1 else ""
        names = f", statistics={list(self.statistics)}" if self.statistics else ""
        return (
            f"{type(self).__name__}(start={self.start}, shape={self.logprobs.shape}, "
            f"logprobs=[{values}{more}]{total}{names})"
        )


class VocabularyRow(Mapping[int, "Logprob"]):
    """One position's log-probabilities of the whole vocabulary, like stock vLLM's dict.

    Iterates the prompt's own token first, then by falling log-probability. Ranks count from 1.
    """

    __slots__ = ("_decode", "_row", "_token")

    def __init__(self, row: np.ndarray, token: int, decode: Callable[[int], str] | None) -> None:
        self._row, self._token, self._decode = row, token, decode

    def __getitem__(self, token_id: int) -> Logprob:
        from vllm.logprobs import Logprob

        if token_id not in self:
            raise KeyError(token_id)
        value = self._row[token_id]
        rank = int(np.count_nonzero(self._row > value)) + 1
        return Logprob(float(value), rank, self._decode(token_id) if self._decode else None)

    def __contains__(self, token_id: object) -> bool:
        return isinstance(token_id, (int, np.integer)) and bool(0 <= token_id < len(self._row))

    def __iter__(self) -> Iterator[int]:
        yield self._token
        for token_id in np.argsort(-self._row, kind="stable").tolist():
            if token_id != self._token:
                yield token_id

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        return f"VocabularyRow({len(self)} tokens, own {self._token}: {self[self._token]})"


class PromptLogprobsView(Sequence[Any]):
    """`RequestOutput.prompt_logprobs` of a score request: None or a mapping per position.

    Args:
        scores: of the request.
        prompt_token_ids: [n], the whole prompt.
        decode: token id to text, for `Logprob.decoded_token`; None leaves it out. Each token is
            decoded by itself: one that is part of a character only reads U+FFFD.
        ranks: int64 [m], of the (first) target of each position: 1 + the number of tokens with a
            larger logit. (Stock vLLM also counts those whose logit is equal: of two that share the
            largest, both have its rank 2, and here rank 1.) As with stock, tokens among the
            likeliest have their place there. Further candidates have rank None: a position's
            logits are compared with one token's.
    """

    def __init__(
        self,
        scores: TokenScores,
        prompt_token_ids: Sequence[int],
        decode: Callable[[int], str] | None = None,
        ranks: np.ndarray | None = None,
    ) -> None:
        self._scores, self._prompt, self._decode = scores, prompt_token_ids, decode
        self._ranks = ranks

    def __len__(self) -> int:
        return len(self._prompt)

    @overload
    def __getitem__(self, index: int) -> Mapping[int, Logprob] | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[Mapping[int, Logprob] | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"prompt position {index} of {len(self)}")
        row = position - self._scores.start
        if not 0 <= row < len(self._scores):
            return None
        if self._scores.token_ids is None:
            return VocabularyRow(self._scores.logprobs[row], self._prompt[position], self._decode)
        return self._targets_and_top(row)

    def _targets_and_top(self, row: int) -> dict[int, Logprob]:
        from vllm.logprobs import Logprob

        scores = self._scores
        assert scores.token_ids is not None
        ids = np.atleast_1d(scores.token_ids[row]).tolist()
        values = np.atleast_1d(scores.logprobs[row]).tolist()
        ranks: list[int | None] = [None] * len(ids)
        if self._ranks is not None:
            ranks[0] = int(self._ranks[row])
        if scores.top_token_ids is not None and scores.top_logprobs is not None:
            ids += scores.top_token_ids[row].tolist()
            values += scores.top_logprobs[row].tolist()
            ranks += range(1, scores.top_token_ids.shape[1] + 1)
        entries: dict[int, Logprob] = {}
        for token_id, value, rank in zip(ids, values, ranks, strict=True):
            if token_id in entries:
                entries[token_id].rank = rank or entries[token_id].rank
                continue
            text = self._decode(token_id) if self._decode else None
            entries[token_id] = Logprob(value, rank, text)
        return entries

    def __repr__(self) -> str:
        scores = self._scores
        return f"PromptLogprobsView({len(self)} positions, scored from {scores.start} on)"

    def __getstate__(self) -> dict[str, Any]:
        # A tokenizer need not be picklable, and is a heavy thing to send along.
        return {**self.__dict__, "_decode": None}
