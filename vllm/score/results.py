"""What a score request gives back: float32 arrays, and a stock-looking view built on demand.

`attach_scores` makes them of the array that the engine returns: `FailedScores` where it is unsound.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import wrapt

from vllm.score.engine.request import ScoreSpec
from vllm.score.errors import ScoreModeError
from vllm.score.ops.statistics import STATISTICS

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from vllm.logprobs import Logprob

NAN = "is NaN; in the order in which to look"

# Attribute of sampling parameters whose generated tokens, too, may be any id of the model: the
# stock code that decodes alternatives takes the whole server down at one without a text.
ANY_ID = "score_any_id"

# What tokenizers raise for an id that they lack.
_UNKNOWN_ID = (IndexError, KeyError, OverflowError, TypeError, ValueError)


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


@dataclass(repr=False, eq=False)
class PromptLogprobsView(Sequence[Any]):
    """`RequestOutput.prompt_logprobs` of a score request: None or a mapping per position.

    Attributes:
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

    scores: TokenScores
    prompt_token_ids: Sequence[int]
    decode: Callable[[int], str] | None = None
    ranks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_token_ids)

    def __getitem__(self, index: Any) -> Any:
        """None or {token id: `Logprob`} of a position; of a slice, a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        row, scores = position - self.scores.start, self.scores
        if not 0 <= row < len(scores):
            return None
        if scores.token_ids is None:
            return VocabularyRow(scores.logprobs[row], self.prompt_token_ids[position], self.decode)
        return self._targets_and_top(row)

    def _targets_and_top(self, row: int) -> dict[int, Logprob]:
        from vllm.logprobs import Logprob

        scores = self.scores
        ids = np.atleast_1d(scores.token_ids[row]).tolist()  # type: ignore[index]
        values = np.atleast_1d(scores.logprobs[row]).tolist()
        ranks = {} if self.ranks is None else {ids[0]: int(self.ranks[row])}
        if scores.top_token_ids is not None and scores.top_logprobs is not None:
            top = scores.top_token_ids[row].tolist()
            ids, values = ids + top, values + scores.top_logprobs[row].tolist()
            ranks |= {token_id: place for place, token_id in enumerate(top, 1)}
        entries: dict[int, Logprob] = {}
        for token_id, value in zip(ids, values, strict=True):
            if token_id not in entries:
                text = self.decode(token_id) if self.decode else None
                entries[token_id] = Logprob(value, ranks.get(token_id), text)
        return entries

    def __repr__(self) -> str:
        return f"PromptLogprobsView({len(self)} positions, scored from {self.scores.start} on)"

    def __getstate__(self) -> dict[str, Any]:
        # A tokenizer need not be picklable, and is a heavy thing to send along.
        return {**self.__dict__, "decode": None}


class FailedScores:
    """Stands where scores would be: every use of it raises the reason.

    A request fails alone: raising in the output loop would take its neighbours down.

    Attributes:
        nan: a score was NaN.
    """

    def __init__(self, reason: str, nan: bool = False) -> None:
        self.reason, self.nan = reason, nan

    def _fail(self, *_: Any) -> Any:
        raise ScoreModeError(self.reason)

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = _fail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and pprint look for optional methods
            raise AttributeError(name)
        return self._fail()

    def __repr__(self) -> str:
        return f"FailedScores({self.reason!r})"


def scores_of(output: Any, name: str) -> TokenScores:
    """The scores of a finished score request.

    Args:
        name: of the request, for errors.

    Raises:
        ScoreModeError: it was aborted, or its scores are unsound.
    """
    if output.scores is None:
        raise ScoreModeError(f"{name} was aborted; ask again when the engine is free.")
    len(output.scores)  # failed scores raise their reason
    scores: TokenScores = output.scores
    return scores


def split_columns(rows: np.ndarray, spec: ScoreSpec) -> TokenScores:
    """The columns of `rows`, [m, width], as `TokenScores`."""
    layout, start, notes = spec.layout, spec.start + 1, spec.notes
    columns = rows[:, layout.num_targets : layout.top_start]
    statistics = {
        name: columns[:, i].astype(STATISTICS[name].dtype)
        for i, name in enumerate(layout.statistics)
    }
    if layout.top < 0:
        return TokenScores(None, rows[:, layout.top_start :], statistics, start, notes=notes)
    logprobs, ids = rows[:, : layout.num_targets], spec.targets.astype(np.int64)
    if spec.flat:
        logprobs, ids = logprobs[:, 0], ids[:, 0]
    top_ids = top_logprobs = None
    if layout.top:
        top_ids, top_logprobs = np.hsplit(rows[:, layout.top_start :], 2)
        top_ids, top_logprobs = top_ids.astype(np.int64), top_logprobs.copy()
    return TokenScores(ids, logprobs.copy(), statistics, start, top_ids, top_logprobs, notes)


def problem_with(output: Any, spec: ScoreSpec) -> str | None:
    """Why the engine's answer must not be taken for scores; None when it is sound."""
    rows, completion = output.prompt_token_id_logprobs, output.outputs[0]
    where = "; `vllm-score doctor` shows whether the engine is patched"
    if completion.token_ids:
        return f"the engine generated tokens for a score request{where}."
    if rows is None:
        return f"the engine returned no scores (finish_reason {completion.finish_reason!r}){where}."
    if rows.shape != spec.result_shape:
        return f"the engine returned scores of shape {rows.shape}, not {spec.result_shape}{where}."
    unsound = _unsound_rows(rows)
    if unsound.any():
        row = spec.start + 1 + int(unsound.argmax())
        return (
            f"the score of prompt position {row} {NAN}: NaN that "
            "another request left in the KV cache (score it again: the cache is emptied before the "
            "next score request that finds the engine idle); NaN logits of the model itself (look "
            "for overflow: try dtype='bfloat16' or 'float32'); on a CPU, requests with and without "
            "a LoRA adapter in one step (send them apart, as score() does); a row that was not "
            "computed (`vllm-score doctor`)."
        )
    return None


def _unsound_rows(rows: np.ndarray) -> np.ndarray:
    """Which rows of [m, width] hold a NaN, bool [m]."""
    if rows.size < 1 << 20:
        return np.isnan(rows).any(axis=1)
    import torch

    # A whole vocabulary: on all cores, and without an array as large as the rows. The largest of a
    # row is NaN if one of them is.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # arrays that came through a socket are read-only
        whole = torch.from_numpy(rows)
    return whole.amax(dim=1).isnan().numpy()


def attach_scores(output: Any, spec: ScoreSpec, tokenizer: Any) -> None:
    """Turn a finished `RequestOutput` of a score request into what the user reads.

    Sets `scores`, `prompt_logprobs` and `prompt_token_ids`. An aborted request has no scores; a
    failed one raises ScoreModeError when they are read, and its finish_reason is "error".

    Args:
        tokenizer: for the texts of the tokens; None leaves them out.
    """
    output.prompt_token_ids = [*output.prompt_token_ids, *spec.unread]
    if not output.finished or output.outputs[0].finish_reason == "abort":
        return
    problem = problem_with(output, spec)
    if problem is not None:
        failed = FailedScores(f"request {output.request_id}: {problem}", nan=NAN in problem)
        output.scores = output.prompt_logprobs = failed
        output.prompt_token_id_logprobs = None
        output.outputs[0].finish_reason = "error"
        return
    scores = split_columns(output.prompt_token_id_logprobs, spec)
    ranks = scores.statistics.get("rank")
    if spec.view_ranks:
        del scores.statistics["rank"]  # computed for the view alone
    output.scores = scores
    decode = None if tokenizer is None else EveryId(tokenizer).text
    output.prompt_logprobs = PromptLogprobsView(scores, output.prompt_token_ids, decode, ranks)
    # The stock field holds what its name says, the statistics' columns are ours. Not a view: on a
    # GPU the engine's array lies in pinned memory, which is to be given back.
    if spec.layout.top >= 0:
        output.prompt_token_id_logprobs = scores.logprobs.reshape(spec.targets.shape)


class EveryId(wrapt.ObjectProxy):
    """A tokenizer for which ids that it lacks are empty texts.

    A model's vocabulary may be larger than its tokenizer's: padded for the hardware, or with
    reserved ids.
    """

    def convert_ids_to_tokens(self, ids: Sequence[int], **options: Any) -> list[str]:
        """The tokens [n] of ids [n]."""
        return [self._token(token_id, **options) for token_id in ids]

    def decode(self, ids: Any, **options: Any) -> str:
        """The text of one id or several; those that the tokenizer lacks add nothing."""
        try:
            return str(self.__wrapped__.decode(ids, **options))
        except _UNKNOWN_ID:
            known = [i for i in ([ids] if isinstance(ids, int) else ids) if self._token(i)]
            return str(self.__wrapped__.decode(known, **options)) if known else ""

    def _token(self, token_id: int, **options: Any) -> str:
        try:
            return self.__wrapped__.convert_ids_to_tokens([token_id], **options)[0] or ""
        except _UNKNOWN_ID:
            return ""

    def text(self, token_id: int) -> str:
        """The text of a token by itself, as vLLM decodes single ids."""
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        return convert_ids_list_to_tokens(self, [token_id])[0]
