"""From a batch of work to engine requests, and from their outputs to its results.

All of a batch is checked before any of it is sent.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vllm.score.eig.drivers.checks import check_room, number, token_ids, whole
from vllm.score.eig.work import Continuation, Next, Sample, Score, Work
from vllm.score.engine.feed import shared_prefix_order
from vllm.score.engine.request import ModelFacts, admit
from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores

MAX_TOP = 20


@dataclass(frozen=True)
class EngineRequest:
    """What `add_request` of an engine takes.

    Attributes:
        ids: int64 [n], the prompt.
        prompt: rendered token prompt.
        params: `SamplingParams`, for a score request with its specification.
    """

    ids: np.ndarray
    prompt: dict[str, Any]
    params: Any


class _Piece(Protocol):
    """One piece of work: its requests, and the way back."""

    requests: list[EngineRequest]

    def value(self, output: Any) -> Any:
        """What a finished output says; ScoreModeError if it says nothing."""

    def result(self, values: list[Any]) -> Any:
        """Of the values of `requests`, in their order."""


class BatchRequests:
    """The requests of a batch, and what came of them; `order` is the one to send them in.

    Args:
        work: of the batch.
        facts: of the engine.

    Raises:
        ScoreModeError: a piece of work is malformed or does not fit the model's context; named by
            its index.
    """

    def __init__(self, work: Sequence[Work], facts: ModelFacts) -> None:
        if not work:
            raise ScoreModeError("work is empty: a Batch has at least one piece.")
        self._pieces = [_piece(i, w, facts) for i, w in enumerate(work)]
        self.requests = [r for p in self._pieces for r in p.requests]
        self._owners = [p for p in self._pieces for _ in p.requests]
        self._values: list[Any] = [None] * len(self.requests)
        # Those with a common context follow each other, and share its computation.
        self.order = shared_prefix_order([r.ids for r in self.requests])

    def take(self, position: int, output: Any) -> None:
        """Keep what the finished output of `requests[position]` says.

        Raises:
            ScoreModeError: it was aborted, or its scores are unsound.
        """
        self._values[position] = self._owners[position].value(output)

    def results(self) -> list[Any]:
        """The results of the batch, once every output was taken."""
        values = iter(self._values)
        return [p.result([next(values) for _ in p.requests]) for p in self._pieces]


def facts_of(engine: Any) -> ModelFacts:
    """What admission needs to know of an `LLMEngine` or `AsyncLLM`.

    Raises:
        ScoreModeError: score mode does not support the engine's configuration.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    from vllm.score.armed import require_score_mode
    from vllm.score.engine.configuration import check_configuration

    require_score_mode()
    check_configuration(engine.vllm_config)
    return ModelFacts.of(engine.input_processor)


def _piece(index: int, work: Work, facts: ModelFacts) -> _Piece:
    from vllm.exceptions import VLLMValidationError

    kinds: dict[type, Any] = {Sample: _Samples, Score: _Scores, Next: _NextTokens}
    make = kinds.get(type(work))
    if make is None:
        raise ScoreModeError(
            f"work[{index}] is a {type(work).__name__}; give a Sample, a Score or a Next."
        )
    try:
        return make(work, facts)
    except (ScoreModeError, VLLMValidationError) as error:
        raise ScoreModeError(f"work[{index}] ({type(work).__name__}): {error}") from error


class _Samples:
    """`Sample`: one request with n outputs; greedy, one that stands for all."""

    def __init__(self, work: Sample, facts: ModelFacts) -> None:
        self._count = whole("count", work.count, 1)
        tokens = whole("max_tokens", work.max_tokens, 1)
        ids = token_ids("context", work.context, facts)
        check_room(len(ids), tokens, "max_tokens", facts)
        if isinstance(work.stop, str):
            raise ScoreModeError(f"stop must be a tuple of texts, got {work.stop!r}.")
        params = _sample_params(
            1 if work.temperature == 0 else self._count,  # vLLM wants n=1 where all are the same
            tokens,
            number("temperature", work.temperature),
            number("top_p", work.top_p),
            tuple(work.stop),
            bool(work.ignore_eos),
        )
        self.requests = [_request(ids, params)]

    def value(self, output: Any) -> list[Continuation]:
        return [_continuation(o) for o in output.outputs]

    def result(self, values: list[Any]) -> list[Continuation]:
        (drawn,) = values
        return list(drawn) if len(drawn) == self._count else list(drawn) * self._count


def _continuation(output: Any) -> Continuation:
    """Of a `CompletionOutput`, whose text ends before the stop text or token.

    Our text ends with the stop text, though its last token may go on; an unfinished character at
    the end is left out.
    """
    ids, text, reason = list(output.token_ids), output.text, output.stop_reason
    if output.finish_reason == "stop":
        if isinstance(reason, str):
            return Continuation(ids, text + reason, True)
        return Continuation(ids[:-1], text, True)  # the end of sequence is no text of its own
    if output.finish_reason == "length":
        return Continuation(ids, text, False)
    raise ScoreModeError(
        f"a Sample ended with finish_reason {output.finish_reason!r}: it was aborted or failed in "
        "the engine; ask again."
    )


class _Scores:
    """`Score`: one request for each target, those that differ in the last token in one."""

    def __init__(self, work: Score, facts: ModelFacts) -> None:
        context = token_ids("context", work.context, facts).tolist()
        if not len(work.targets):
            raise ScoreModeError("targets is empty: give at least one.")
        # Last tokens by what comes before them, in the order given.
        groups: dict[tuple[int, ...], dict[int, None]] = {}
        targets = []
        for i, target in enumerate(work.targets):
            ids = token_ids(f"targets[{i}]", target, facts).tolist()
            check_room(len(context), len(ids), f"targets[{i}]", facts)
            *body, last = ids
            groups.setdefault(tuple(body), {})[last] = None
            targets.append((tuple(body), last))
        self.requests: list[EngineRequest] = []
        places: dict[tuple[tuple[int, ...], int], tuple[int, int]] = {}
        # A server allows its clients so many candidates at a position.
        width = None if facts.max_logprobs is None else max(facts.max_logprobs, 1)
        for before, distinct in groups.items():
            lasts = list(distinct)
            step = width or len(lasts)
            for start in range(0, len(lasts), step):
                columns = lasts[start : start + step]
                for column, last in enumerate(columns):
                    places[before, last] = len(self.requests), column
                rows = [[t] * len(columns) for t in before] + [columns]
                prompt = [*context, *before, columns[0]]
                self.requests.append(_score_request(prompt, rows, 0, facts))
        self._places = [places[target] for target in targets]

    def value(self, output: Any) -> np.ndarray:
        return _sound(_scores(output).logprobs)

    def result(self, values: list[Any]) -> list[np.ndarray]:
        return [values[request][:, column].copy() for request, column in self._places]


class _NextTokens:
    """`Next`: the tokens after the context, whatever token is scored there."""

    def __init__(self, work: Next, facts: ModelFacts) -> None:
        top = whole("top", work.top, 1, min(MAX_TOP, facts.vocab_size))
        ids = token_ids("context", work.context, facts).tolist()
        check_room(len(ids), 1, "the next token", facts)
        self.requests = [_score_request([*ids, ids[-1]], [[ids[-1]]], top, facts)]

    def value(self, output: Any) -> tuple[np.ndarray, np.ndarray]:
        scores = _scores(output)
        assert scores.top_token_ids is not None and scores.top_logprobs is not None
        ids, logprobs = scores.top_token_ids[0], _sound(scores.top_logprobs)[0]
        order = np.lexsort((ids, -logprobs))
        return ids[order], logprobs[order]

    def result(self, values: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        (found,) = values
        return found


def _scores(output: Any) -> TokenScores:
    scores = output.scores
    if scores is None:
        raise ScoreModeError(
            f"a score request ended with finish_reason {output.outputs[0].finish_reason!r}: it was "
            "aborted in the engine; ask again."
        )
    len(scores)  # failed scores raise their reason
    return scores


def _sound(logprobs: np.ndarray) -> np.ndarray:
    wrong = np.isnan(logprobs) | np.isposinf(logprobs)
    if wrong.any():
        raise ScoreModeError(
            f"the engine returned a log-probability of {logprobs[wrong][0]}: look for overflow in "
            "the model (try dtype='bfloat16' or 'float32')."
        )
    return logprobs


@functools.lru_cache(maxsize=256)
def _sample_params(
    count: int, max_tokens: int, temperature: float, top_p: float, stop: tuple[str, ...], on: bool
) -> Any:
    """Made by hand, they take nothing but end-of-sequence ids from the generation config."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=count,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=list(stop),
        ignore_eos=on,
        skip_special_tokens=False,
        # The text then holds no end of sequence; the stop text is in `stop_reason`.
        include_stop_str_in_output=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@functools.lru_cache(maxsize=32)
def _score_params(top: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        score_mode=True, prompt_logprobs=top, output_kind=RequestOutputKind.FINAL_ONLY
    )


def _request(ids: np.ndarray, params: Any) -> EngineRequest:
    return EngineRequest(ids, {"type": "token", "prompt_token_ids": ids.tolist()}, params)


def _score_request(
    prompt: list[int], rows: list[list[int]], top: int, facts: ModelFacts
) -> EngineRequest:
    params = _score_params(top)
    request = admit(prompt, rows, params, facts)
    return EngineRequest(request.ids, request.prompt, request.params)
