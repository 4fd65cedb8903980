"""Batches of work on an engine: `LLMReasoner`, `AsyncLLMReasoner`, and the requests they send."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter
from types import coroutine
from typing import TYPE_CHECKING, Annotated, Any, Generic

import numpy as np
from pydantic import Field

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.score.api import dead_engine_raises, shared_prefix_order
from vllm.score.armed import require_score_mode
from vllm.score.checks import Count, Number, Whole, check
from vllm.score.continuations import MergedContinuations
from vllm.score.eig.records import (
    MAX_TOP,
    Batch,
    Continuation,
    DeadlineExceeded,
    Next,
    Problem,
    Sample,
    Score,
    T,
    ends_everything,
)
from vllm.score.engine.configuration import check_configuration, check_llm
from vllm.score.engine.request import AdmittedRequest, ModelFacts, admit
from vllm.score.errors import ScoreModeError
from vllm.score.results import scores_of
from vllm.score.tokens import read_token_ids

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM


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
        self.facts = _facts(llm.llm_engine, lora_request)
        self._llm, self._engine, self._lora_request = llm, llm.llm_engine, lora_request
        self._concurrency = check("concurrency", concurrency, Count)

    async def run(self, batch: Batch) -> list[Any]:
        """See `Reasoner.run`; it runs the engine until the batch is done."""
        ((_, results),) = self.run_all([lambda reasoner: reasoner.run(batch)])
        return results

    def run_all(self, problems: Iterable[Problem[T]]) -> Generator[tuple[int, T], None, None]:
        """Yield (index, value) of problems as they finish.

        They may await `run` of the reasoner that they are given, and nothing else. Each goes on as
        soon as its own batch is done. Of `problems` no more are taken than run; the time that the
        consumer takes between values counts for the deadlines. What goes wrong in a batch is
        raised in its problem. An exception that leaves a problem leaves here. However this ends,
        what is still running is aborted, and problems that have begun are closed.

        Raises:
            ScoreModeError: the engine is busy, or somebody else ran it meanwhile.
        """
        if self._engine.has_unfinished_requests():
            raise ScoreModeError("llm has unfinished requests; reasoning needs an idle engine.")
        waiting = enumerate(problems)
        live: dict[int, _Live[T]] = {}
        with dead_engine_raises(self._engine):
            try:
                while True:
                    while len(live) < self._concurrency and (begun := next(waiting, None)):
                        index, problem = begun
                        live[index] = _Live(problem(_Handing(self.tokenizer)))
                        yield from self._go_on(live, index, None)
                    if not live:
                        return
                    for index, outcome in self._step(live).items():
                        yield from self._go_on(live, index, outcome)
            finally:
                try:
                    for each in live.values():
                        self._abort(each)
                finally:
                    for each in live.values():
                        each.steps.close()

    def _go_on(
        self, live: dict[int, _Live[T]], index: int, outcome: list[Any] | Exception | None
    ) -> Iterator[tuple[int, T]]:
        """Run a problem until a batch of it is in the engine, or yield its value.

        Args:
            outcome: of the batch that it waited for.
        """
        this = live[index]
        while True:
            try:
                if isinstance(outcome, Exception):
                    self._abort(this)
                    batch = this.steps.throw(outcome)
                else:
                    batch = this.steps.send(outcome)
            except StopIteration as stop:
                del live[index]
                yield index, stop.value
                return
            try:
                self._send(this, batch)
                return
            except Exception as error:
                if ends_everything(error):
                    raise
                outcome = error

    def _send(self, this: _Live[T], batch: Any) -> None:
        if not isinstance(batch, Batch):
            raise ScoreModeError(
                f"a problem awaits {batch!r:.60}; on an LLM it may await reasoner.run(batch) only."
            )
        this.requests = BatchRequests(batch, self.facts)
        for position in this.requests.order:
            request, name = this.requests.requests[position], str(next(self._llm.request_counter))
            own = self._engine.add_request(
                name, request.prompt, request.params, lora_request=self._lora_request
            )
            this.unfinished[name] = position, own

    def _step(self, live: dict[int, _Live[T]]) -> dict[int, list[Any] | Exception]:
        """One step of the engine; the outcomes of the batches that end by it."""
        if not self._engine.get_num_unfinished_requests():
            raise ScoreModeError(
                "the engine lost the reasoning's requests: llm was used while run_all was running; "
                "take all of its values first."
            )
        ended: dict[int, list[Any] | Exception] = {}
        for output in self._engine.step():  # each is a finished request's
            owners = (i for i, each in live.items() if output.request_id in each.unfinished)
            index = next(owners, None)
            if index is None or index in ended:
                continue
            this = live[index]
            position, _ = this.unfinished.pop(output.request_id)
            try:
                this.requests.take(position, output)
                if not this.unfinished:
                    ended[index] = this.requests.results()
            except Exception as error:
                ended[index] = error
        late = {i: each.requests.too_late() for i, each in live.items() if each.requests.left <= 0}
        return late | ended

    def _abort(self, this: _Live[T]) -> None:
        """Have the engine forget what is left of a problem's batch."""
        if this.unfinished:
            self._engine.abort_request([own for _, own in this.unfinished.values()], internal=True)
            this.unfinished.clear()


@dataclass
class _Live(Generic[T]):
    """A problem that has begun.

    Attributes:
        steps: the problem.
        requests: of the batch that it waits for.
        unfinished: of these, by request id: position in the batch, and the engine's own id.
    """

    steps: Coroutine[Any, Any, T]
    requests: BatchRequests = field(init=False)
    unfinished: dict[str, tuple[int, str]] = field(default_factory=dict)


@dataclass
class _Handing:
    """The reasoner that a problem of `LLMReasoner.run_all` is given."""

    tokenizer: Any

    @coroutine
    def run(self, batch: Batch) -> Generator[Batch, list[Any], list[Any]]:
        """Hands the batch to whoever runs the problem, and who sends the results."""
        return (yield batch)


class AsyncLLMReasoner:
    """A `Reasoner` on an `AsyncLLM`, which may have other requests (examples/eig/beside_others.py).

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
        requests = BatchRequests(batch, self._facts)
        name = uuid.uuid4().hex
        limit = asyncio.timeout(None if batch.deadline is None else requests.left)
        try:
            async with limit, asyncio.TaskGroup() as group:
                for position in requests.order:
                    group.create_task(self._one(requests, position, f"eig-{name}-{position}"))
        except TimeoutError:
            if not limit.expired():
                raise
            raise requests.too_late() from None
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one; it had the others cancelled
        finally:
            if requests.unfinished:
                # One that was cancelled while it was being added is not aborted by `generate`.
                names = [f"eig-{name}-{position}" for position in requests.unfinished]
                await asyncio.shield(self._engine.abort(names))
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
                while len(running) < self._concurrency and (begun := next(waiting, None)):
                    index, problem = begun
                    running[asyncio.create_task(problem(self))] = index
                if not running:
                    return
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=running.__getitem__):
                    yield running.pop(task), task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _one(self, requests: BatchRequests, position: int, name: str) -> None:
        request = requests.requests[position]
        given = request.prompt, request.params, name
        outputs = self._engine.generate(*given, lora_request=self._lora_request)
        found = [output async for output in outputs]  # the final one only
        if not found:
            raise ScoreModeError("the engine ended a request without an output; ask again.")
        requests.take(position, found[-1])


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


@dataclass(frozen=True)
class _Piece:
    """One piece of work: its requests, and the way back.

    Attributes:
        read: what a finished output says; ScoreModeError if it says nothing.
        result: of what the outputs of `requests` say, in their order; by default the first.
    """

    requests: list[AdmittedRequest]
    read: Callable[[Any], Any]
    result: Callable[[list[Any]], Any] = itemgetter(0)


class BatchRequests:
    """The requests of a batch, and what came of them.

    Args:
        batch: all of it is checked.
        facts: of the engine.

    Attributes:
        requests: at their positions.
        order: the positions, as they are to be sent: those with a common context follow each
            other, and share its computation.
        unfinished: positions whose output was not taken.

    Raises:
        DeadlineExceeded: it has passed.
        ScoreModeError: a piece of work is malformed or does not fit the model's context; named by
            its index.
    """

    def __init__(self, batch: Batch, facts: ModelFacts) -> None:
        self._deadline = math.inf if batch.deadline is None else batch.deadline
        if self.left <= 0:
            raise DeadlineExceeded(
                "deadline had passed before the batch was sent; give a later one."
            )
        if not batch.work:
            raise ScoreModeError("work is empty: a Batch has at least one piece.")
        self._pieces = [_piece(i, work, facts) for i, work in enumerate(batch.work)]
        self.requests = [request for piece in self._pieces for request in piece.requests]
        self.order = shared_prefix_order([request.ids for request in self.requests])
        self.unfinished = set(self.order)
        self._readers = [piece.read for piece in self._pieces for _ in piece.requests]
        self._values: list[Any] = [None] * len(self.requests)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - time.monotonic()

    def too_late(self) -> DeadlineExceeded:
        """The error where the deadline has passed."""
        return DeadlineExceeded(
            f"deadline passed with {len(self.unfinished)} of {len(self.requests)} requests "
            "unfinished; give a later one, or less work."
        )

    def take(self, position: int, output: Any) -> None:
        """Keep what the finished output of `requests[position]` says.

        Raises:
            ScoreModeError: it was aborted, or its scores are unsound.
        """
        self.unfinished.discard(position)
        self._values[position] = self._readers[position](output)

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
        drawn = [_continuation(each) for each in output.outputs]
        return drawn * (count // len(drawn))

    return _Piece([AdmittedRequest(ids, params)], read)


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

    return _Piece(requests, lambda output: scores_of(output, "a Score").logprobs, result)


def _next(work: Next, facts: ModelFacts) -> _Piece:
    """The tokens after the context, whatever token is scored there."""
    top = check("top", work.top, Annotated[Whole, Field(ge=1, le=min(MAX_TOP, facts.vocab_size))])
    ids = _token_ids("context", work.context, facts).tolist()
    _check_room(len(ids), 1, "the next token", facts)

    def read(output: Any) -> tuple[np.ndarray, np.ndarray]:
        scores = scores_of(output, "a Next")
        assert scores.top_token_ids is not None and scores.top_logprobs is not None
        found, logprobs = scores.top_token_ids[0], scores.top_logprobs[0]
        order = np.lexsort((found, -logprobs))
        return found[order], logprobs[order]

    request = admit([*ids, ids[-1]], [[ids[-1]]], _score_params(top), facts)
    return _Piece([request], read)


def _token_ids(name: str, given: Any, facts: ModelFacts) -> np.ndarray:
    """Checked token ids, int64 [n], n >= 1."""
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


@lru_cache(maxsize=32)
def _score_params(top: int) -> SamplingParams:
    return SamplingParams(
        score_mode=True, prompt_logprobs=top, output_kind=RequestOutputKind.FINAL_ONLY
    )
