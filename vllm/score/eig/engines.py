"""Batches of work on an engine: `LLMReasoner`, `AsyncLLMReasoner`, and the requests they send."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import (
    AsyncGenerator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, field
from functools import lru_cache
from types import coroutine
from typing import TYPE_CHECKING, Annotated, Any, Generic

import numpy as np
from pydantic import Field

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.score.api import shared_prefix_order
from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, Number, Whole, check
from vllm.score.continuations import MergedContinuations
from vllm.score.eig.reasoner import (
    MAX_TOP,
    Batch,
    Continuation,
    DeadlineExceeded,
    Next,
    Problem,
    Sample,
    Score,
    T,
    Work,
    ends_everything,
)
from vllm.score.engine.configuration import check_configuration, check_llm
from vllm.score.engine.request import AdmittedRequest, ModelFacts, admit
from vllm.score.errors import ScoreModeError
from vllm.score.results import TokenScores
from vllm.score.tokens import read_token_ids

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_PASSED = "deadline had passed before the batch was sent; give a later one."


class LLMReasoner:
    """A `Reasoner` on an `LLM` on which nothing else is running, in this thread.

    It needs no event loop, and runs where there is one already (notebooks, servers). Deadlines are
    looked at between the engine's steps, so that one is noticed up to a step late.

    Args:
        llm: with its engine in this process or in another one.
        concurrency: problems that run side by side.
        lora_request: an adapter for all requests.

    Attributes:
        tokenizer: of the model.

    Raises:
        ScoreModeError: the engine's configuration is not supported, or an argument is wrong.
    """

    def __init__(
        self, llm: LLM, *, concurrency: int = 32, lora_request: LoRARequest | None = None
    ) -> None:
        check_llm(llm)
        self.tokenizer: Any = llm.get_tokenizer()
        self.llm, self.lora_request = llm, lora_request
        self.facts = _facts(llm.llm_engine, lora_request)
        self._concurrency = check("concurrency", concurrency, Count)
        self.driven = False  # a problem of `run_all` is being run at this moment

    async def run(self, batch: Batch) -> list[Any]:
        """See `Reasoner.run`. Awaited outside of `run_all`, it runs the engine until it is done."""
        if self.driven:
            return await _results_of(batch)
        ((_, results),) = self.run_all([lambda reasoner: reasoner.run(batch)])
        return results

    def run_all(self, problems: Iterable[Problem[T]]) -> Generator[tuple[int, T], None, None]:
        """Yield (index, value) of problems as they finish; they may await `run`, nothing else.

        Each goes on as soon as its own batch is done. Of `problems` no more are taken than run; the
        time that the consumer takes between values counts for the deadlines. What goes wrong in a
        batch is raised in its problem. An exception that leaves a problem leaves here. However
        this ends, what is still running is aborted, and problems that have begun are closed.

        Raises:
            ScoreModeError: the engine is busy, or somebody else ran it meanwhile.
        """
        if self.llm.llm_engine.has_unfinished_requests():
            raise ScoreModeError("llm has unfinished requests; reasoning needs an idle engine.")
        run: _Run[T] = _Run(self)
        waiting = enumerate(problems)
        try:
            while True:
                while len(run.live) < self._concurrency:
                    index, problem = next(waiting, (0, None))
                    if problem is None:
                        break
                    run.live[index] = _Live(problem(self))
                    yield from run.go_on(index)
                if not run.live:
                    return
                yield from run.step()
        finally:
            run.close()


@coroutine
def _results_of(batch: Batch) -> Generator[Batch, list[Any], list[Any]]:
    """Hands the batch to the `_Run` that runs this coroutine, which sends the results."""
    return (yield batch)


@dataclass
class _Live(Generic[T]):
    """A problem that has begun, and the batch that it waits for.

    Attributes:
        unfinished: the engine's request id by position in the batch.
    """

    steps: Coroutine[Batch, Any, T]
    requests: BatchRequests = field(init=False)  # of its last batch
    deadline: float | None = None
    unfinished: dict[int, str] = field(default_factory=dict)


class _Run(Generic[T]):
    """The problems of one `run_all` that have begun and not ended."""

    def __init__(self, reasoner: LLMReasoner) -> None:
        self._reasoner, self._engine = reasoner, reasoner.llm.llm_engine
        self.live: dict[int, _Live[T]] = {}
        # Index of the problem and position in its batch, by request id.
        self._owners: dict[str, tuple[int, int]] = {}

    def go_on(
        self, index: int, outcome: list[Any] | Exception | None = None
    ) -> Iterator[tuple[int, T]]:
        """Run a problem until a batch of it is in the engine, or yield its value.

        Args:
            outcome: of the batch that it waited for.
        """
        while True:
            live = self.live.pop(index)  # what it raises leaves it ended
            self._reasoner.driven = True
            try:
                if isinstance(outcome, Exception):
                    self._abort(index, live)
                    batch = live.steps.throw(outcome)
                else:
                    batch = live.steps.send(outcome)
            except StopIteration as stop:
                yield index, stop.value
                return
            finally:
                self._reasoner.driven = False
            self.live[index] = live
            try:
                self._send(index, live, batch)
                return
            except Exception as error:
                if ends_everything(error):
                    raise
                outcome = error

    def step(self) -> Iterator[tuple[int, T]]:
        """One step of the engine, and what follows from it; yield what is finished then."""
        if not self._engine.get_num_unfinished_requests():
            raise ScoreModeError(
                "the engine lost the reasoning's requests: llm was used while run_all was running; "
                "take all of its values first."
            )
        ready: dict[int, list[Any] | Exception] = {}
        for output in self._engine.step():
            owner = self._owners.pop(output.request_id, None) if output.finished else None
            if owner is None or owner[0] in ready:
                continue
            index, position = owner
            requests, unfinished = self.live[index].requests, self.live[index].unfinished
            del unfinished[position]
            try:
                requests.take(position, output)
                if not unfinished:
                    ready[index] = requests.results()
            except Exception as error:
                ready[index] = error
        now = time.monotonic()
        for index, live in self.live.items():
            if index not in ready and live.deadline is not None and live.deadline <= now:
                ready[index] = _too_late(live.unfinished, live.requests)
        for index, outcome in ready.items():
            yield from self.go_on(index, outcome)

    def close(self) -> None:
        """Abort what is running, and close the problems."""
        try:
            for index, live in self.live.items():
                self._abort(index, live)
        finally:
            for live in self.live.values():
                live.steps.close()
            self.live.clear()

    def _send(self, index: int, live: _Live[T], batch: Any) -> None:
        reasoner = self._reasoner
        if not isinstance(batch, Batch):
            raise ScoreModeError(
                f"a problem awaits {batch!r:.60}; on an LLM it may await reasoner.run(batch) only."
            )
        if batch.deadline is not None and batch.deadline <= time.monotonic():
            raise DeadlineExceeded(_PASSED)
        live.deadline = batch.deadline
        live.requests = BatchRequests(batch.work, reasoner.facts)
        for position in live.requests.order:
            request = live.requests.requests[position]
            request_id = str(next(reasoner.llm.request_counter))
            live.unfinished[position] = self._engine.add_request(
                request_id, request.prompt, request.params, lora_request=reasoner.lora_request
            )
            self._owners[request_id] = index, position

    def _abort(self, index: int, live: _Live[T]) -> None:
        """Have the engine forget what is left of a problem's batch."""
        unfinished = list(live.unfinished.values())
        live.unfinished.clear()
        if unfinished:
            self._owners = {k: owner for k, owner in self._owners.items() if owner[0] != index}
            self._engine.abort_request(unfinished, internal=True)


class AsyncLLMReasoner:
    """A `Reasoner` on an `AsyncLLM`, which may have other requests.

        async with aclosing(reasoner.run_all(eig_problems(tokenizer, questions, rule))) as running:
            async for index, trace in running: ...

    Args:
        async_llm: the engine.
        tokenizer: of the model; by default the engine's.
        concurrency: problems that `run_all` runs side by side.
        lora_request: an adapter for all requests.

    Attributes:
        tokenizer: of the model.

    Raises:
        ScoreModeError: the engine's configuration is not supported, or an argument is wrong.
    """

    def __init__(
        self,
        async_llm: AsyncLLM,
        tokenizer: Any = None,
        *,
        concurrency: int = 32,
        lora_request: LoRARequest | None = None,
    ) -> None:
        self.tokenizer: Any = async_llm.get_tokenizer() if tokenizer is None else tokenizer
        self._engine, self._lora_request = async_llm, lora_request
        self._facts = _facts(async_llm, lora_request)
        self._concurrency = check("concurrency", concurrency, Count)

    async def run(self, batch: Batch) -> list[Any]:
        """See `Reasoner.run`; also where it is cancelled, its requests are aborted."""
        left = None if batch.deadline is None else batch.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineExceeded(_PASSED)
        requests = BatchRequests(batch.work, self._facts)
        name = f"eig-{uuid.uuid4().hex}"
        unfinished = {i: f"{name}-{i}" for i in requests.order}
        limit = asyncio.timeout(left)
        try:
            async with limit, asyncio.TaskGroup() as group:
                for position in requests.order:
                    group.create_task(self._one(requests, position, unfinished))
        except TimeoutError:
            if not limit.expired():
                raise
            raise _too_late(unfinished, requests) from None
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one; it had the others cancelled
        finally:
            if unfinished:
                # One that was cancelled while it was being added is not aborted by `generate`.
                await asyncio.shield(self._engine.abort(list(unfinished.values())))
        return requests.results()

    async def run_all(self, problems: Iterable[Problem[T]]) -> AsyncGenerator[tuple[int, T], None]:
        """Yield (index, value) of problems as they finish.

        Of `problems` no more are taken than run. An exception that leaves a problem leaves here.
        However this ends, what is still running is aborted; close it (`contextlib.aclosing`) where
        it is left early.
        """
        waiting = enumerate(problems)
        running: dict[asyncio.Task[T], int] = {}
        try:
            while True:
                while len(running) < self._concurrency:
                    index, problem = next(waiting, (0, None))
                    if problem is None:
                        break
                    running[asyncio.create_task(problem(self))] = index
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=running.__getitem__):
                    index = running.pop(task)
                    yield index, task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one(
        self, requests: BatchRequests, position: int, unfinished: dict[int, str]
    ) -> None:
        request = requests.requests[position]
        output: Any = None
        async for latest in self._engine.generate(
            request.prompt, request.params, unfinished[position], lora_request=self._lora_request
        ):
            output = latest
        del unfinished[position]
        if output is None:
            raise ScoreModeError("the engine ended a request without an output; ask again.")
        requests.take(position, output)


def _facts(engine: Any, lora_request: LoRARequest | None) -> ModelFacts:
    """What admission needs to know of an `LLMEngine` or `AsyncLLM`.

    Raises:
        ScoreModeError: the engine's configuration is not supported, or it takes no adapter.
        ScoreModeUnavailable: score mode is off in this installation.
    """
    require_score_mode()
    check_configuration(engine.vllm_config)
    if lora_request is not None and engine.vllm_config.lora_config is None:
        raise ScoreModeError(
            "lora_request is given, but the engine has no LoRA: start it with enable_lora=True."
        )
    return ModelFacts.of(engine.input_processor)


def _too_late(unfinished: dict[int, str], requests: BatchRequests) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"deadline passed with {len(unfinished)} of {len(requests.requests)} requests unfinished; "
        "give a later one, or less work."
    )


@dataclass(frozen=True)
class _Piece:
    """One piece of work: its requests, and the way back.

    Attributes:
        read: what a finished output says; ScoreModeError if it says nothing.
        result: of what the outputs of `requests` say, in their order.
    """

    requests: list[AdmittedRequest]
    read: Callable[[Any], Any]
    result: Callable[[list[Any]], Any]


class BatchRequests:
    """The requests of a batch, and what came of them; `order` is the one to send them in.

    Args:
        work: of the batch; all of it is checked.
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
        self._values[position] = self._owners[position].read(output)

    def results(self) -> list[Any]:
        """The results of the batch, once every output was taken."""
        values = iter(self._values)
        return [p.result([next(values) for _ in p.requests]) for p in self._pieces]


def _piece(index: int, work: Any, facts: ModelFacts) -> _Piece:
    kinds: dict[type, Callable[..., _Piece]] = {Sample: _sample, Score: _score, Next: _next}
    if type(work) not in kinds:
        raise ScoreModeError(
            f"work[{index}] is a {type(work).__name__}; give a Sample, a Score or a Next."
        )
    try:
        return kinds[type(work)](work, facts)
    except (ScoreModeError, VLLMValidationError) as error:
        raise ScoreModeError(f"work[{index}] ({type(work).__name__}): {error}") from error


def _sample(work: Sample, facts: ModelFacts) -> _Piece:
    """One request with n outputs; greedy, one that stands for all."""
    count, tokens = check("count", work.count, Count), check("max_tokens", work.max_tokens, Count)
    ids = _token_ids("context", work.context, facts)
    _check_room(len(ids), tokens, "max_tokens", facts)
    if isinstance(work.stop, str):
        raise ScoreModeError(f"stop must be a tuple of texts, got {work.stop!r}.")
    # Made by hand, they take nothing but end-of-sequence ids from the generation config.
    params = SamplingParams(
        n=1 if work.temperature == 0 else count,  # vLLM wants n=1 where all are the same
        max_tokens=tokens,
        temperature=check("temperature", work.temperature, Number),
        top_p=check("top_p", work.top_p, Number),
        stop=list(work.stop),
        ignore_eos=bool(work.ignore_eos),
        skip_special_tokens=False,
        # The text then holds no end of sequence; the stop text is in `stop_reason`.
        include_stop_str_in_output=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def read(output: Any) -> list[Continuation]:
        return [_continuation(each) for each in output.outputs]

    def result(values: list[list[Continuation]]) -> list[Continuation]:
        return values[0] * (count // len(values[0]))

    return _Piece([AdmittedRequest(ids, params)], read, result)


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


def _score(work: Score, facts: ModelFacts) -> _Piece:
    """One request for each target; those that differ in the last token share one."""
    context = _token_ids("context", work.context, facts).tolist()
    if not len(work.targets):
        raise ScoreModeError("targets is empty: give at least one.")
    pairs = []
    for i, target in enumerate(work.targets):
        ids = _token_ids(f"targets[{i}]", target, facts).tolist()
        _check_room(len(context), len(ids), f"targets[{i}]", facts)
        pairs.append((context, ids))
    # A server allows its clients so many candidates at a position.
    width = math.inf if facts.max_logprobs is None else max(facts.max_logprobs, 1)
    merged = MergedContinuations(pairs, width=width)
    params = _score_params(0)
    requests = [admit(**each, params=params, facts=facts) for each in merged.requests]

    def result(values: list[Any]) -> list[np.ndarray]:
        return [place.of(values[place.request]).copy() for place in merged.places]

    return _Piece(requests, lambda output: _sound(_scores(output).logprobs), result)


def _next(work: Next, facts: ModelFacts) -> _Piece:
    """The tokens after the context, whatever token is scored there."""
    top = check("top", work.top, Annotated[Whole, Field(ge=1, le=min(MAX_TOP, facts.vocab_size))])
    ids = _token_ids("context", work.context, facts).tolist()
    _check_room(len(ids), 1, "the next token", facts)

    def read(output: Any) -> tuple[np.ndarray, np.ndarray]:
        scores = _scores(output)
        assert scores.top_token_ids is not None and scores.top_logprobs is not None
        found, logprobs = scores.top_token_ids[0], _sound(scores.top_logprobs)[0]
        order = np.lexsort((found, -logprobs))
        return found[order], logprobs[order]

    request = admit([*ids, ids[-1]], [[ids[-1]]], _score_params(top), facts)
    return _Piece([request], read, lambda values: values[0])


def _token_ids(name: str, given: Any, facts: ModelFacts) -> np.ndarray:
    """Checked token ids, int64 [n], n >= 1."""
    if isinstance(given, str):
        raise ScoreModeError(
            f"{name} must be a list of token ids, got str; encode texts with the reasoner's "
            "tokenizer."
        )
    ids = read_token_ids(given, facts.vocab_size, name)
    if not len(ids):
        raise ScoreModeError(f"{name} is empty: give at least one token id.")
    return ids


def _check_room(context: int, tokens: int, name: str, facts: ModelFacts) -> None:
    if context + tokens > facts.max_model_len:
        raise ScoreModeError(
            f"context has {context} tokens, with {tokens} of {name} {context + tokens}; the "
            f"engine's max_model_len is {facts.max_model_len}: shorten the context or ask for less."
        )


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


@lru_cache(maxsize=32)
def _score_params(top: int) -> SamplingParams:
    return SamplingParams(
        score_mode=True, prompt_logprobs=top, output_kind=RequestOutputKind.FINAL_ONLY
    )
