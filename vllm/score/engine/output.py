"""From the array that the engine returns to the scores on the request's output."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import wrapt

from vllm.score.engine.request import ScoreSpec
from vllm.score.errors import ScoreModeError
from vllm.score.ops.statistics import STATISTICS
from vllm.score.results import PromptLogprobsView, TokenScores

NAN = "is NaN; in the order in which to look"

# Attribute of sampling parameters whose generated tokens, too, may be any id of the model: the
# stock code that decodes alternatives takes the whole server down at one without a text.
ANY_ID = "score_any_id"

# What tokenizers raise for an id that they lack.
_UNKNOWN_ID = (IndexError, KeyError, OverflowError, TypeError, ValueError)


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


def attach_scores(output: Any, spec: ScoreSpec, decode: Callable[[int], str] | None) -> None:
    """Turn a finished `RequestOutput` of a score request into what the user reads.

    Sets `scores`, `prompt_logprobs` and `prompt_token_ids`. An aborted request has no scores; a
    failed one raises ScoreModeError when they are read, and its finish_reason is "error".
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
    rows = output.prompt_token_id_logprobs
    scores = split_columns(rows, spec)
    ranks = scores.statistics.get("rank")
    if spec.view_ranks:
        del scores.statistics["rank"]  # computed for the view alone
    output.scores = scores
    output.prompt_logprobs = PromptLogprobsView(scores, output.prompt_token_ids, decode, ranks)
    # The stock field holds what its name says, the statistics' columns are ours. Not a view: on a
    # GPU the engine's array lies in pinned memory, which is to be given back.
    if spec.layout.top >= 0:
        output.prompt_token_id_logprobs = scores.logprobs.reshape(
            len(rows), spec.layout.num_targets
        )


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


def decoder(tokenizer: Any) -> Callable[[int], str] | None:
    """Token id to text, as vLLM decodes single ids; None without a tokenizer."""
    if tokenizer is None:
        return None
    every = EveryId(tokenizer)

    def decode(token_id: int) -> str:
        from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens

        return convert_ids_list_to_tokens(every, [token_id])[0]

    return decode
