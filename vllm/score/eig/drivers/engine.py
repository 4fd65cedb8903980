"""Many decisions side by side on an `LLM`, in this thread."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from vllm.score.eig.drivers.checks import whole
from vllm.score.eig.drivers.requests import BatchRequests, facts_of
from vllm.score.eig.work import Batch, DeadlineExceeded, Steps, ends_everything
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

T = TypeVar("T")

PASSED = "deadline had passed before the batch was sent; give a later one."


class EngineDriver:
    """Runs generators of batches on an `LLM` on which nothing else is running; a `Reasoner`.

    Deadlines are looked at between the engine's steps, so that one is noticed up to a step late.

    Args:
        llm: with its engine in this process or in another one.
        concurrency: generators that are live at once.
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
        check_adapter(llm.llm_engine, lora_request)
        self.tokenizer: Any = llm.get_tokenizer()
        self._llm = llm
        self._facts = facts_of(llm.llm_engine)
        self._concurrency = whole("concurrency", concurrency, 1)
        self._lora_request = lora_request

    def run(self, batch: Batch) -> list[Any]:
        """The results of one batch, in the order of its work.

        Raises:
            DeadlineExceeded: it was not done in time; what was running is aborted.
            ScoreModeError: the work is malformed, it failed, or the engine is busy.
        """
        done: list[tuple[int, list[Any]]] = list(self.run_all([_one_batch(batch)]))
        return done[0][1]

    def run_all(self, problems: Iterable[Steps[T]]) -> Generator[tuple[int, T], None, None]:
        """Yield (index, value) of generators as they finish.

        Each goes on as soon as its own batch is done. Of `problems` no more are taken than run; the
        time that the consumer takes between values counts for the deadlines. What goes wrong in a
        batch is thrown into its generator. An exception that leaves a generator leaves here.
        However this ends, what is still running is aborted, and live generators are closed.

        Raises:
            ScoreModeError: the engine is busy, or somebody else ran it meanwhile.
        """
        run: _Run[T] = _Run(self._llm, self._facts, self._lora_request)
        waiting = enumerate(problems)
        try:
            run.check_idle()
            while True:
                yield from run.start(waiting, self._concurrency)
                if not run.live:
                    return
                yield from run.step()
        finally:
            run.close()


def check_adapter(engine: Any, lora_request: LoRARequest | None) -> None:
    """Refuse an adapter for an `LLMEngine` or `AsyncLLM` that takes none."""
    if lora_request is not None and engine.vllm_config.lora_config is None:
        raise ScoreModeError(
            "lora_request is given, but the engine has no LoRA: start it with enable_lora=True."
        )


def too_late(unfinished: int, count: int) -> DeadlineExceeded:
    """The error for a batch whose deadline has passed."""
    return DeadlineExceeded(
        f"deadline passed with {unfinished} of {count} requests unfinished; give a later one, or "
        "less work."
    )


def _one_batch(batch: Batch) -> Steps[list[Any]]:
    results: list[Any] = yield batch
    return results


class _Running:
    """A batch of which requests are in the engine.

    Attributes:
        unfinished: engine's request id by position.
    """

    def __init__(self, requests: BatchRequests, deadline: float | None) -> None:
        self.requests, self.deadline = requests, deadline
        self.unfinished: dict[int, str] = {}


class _Run(Generic[T]):
    """The state of one `run_all`."""

    def __init__(self, llm: LLM, facts: Any, lora_request: LoRARequest | None) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._facts, self._lora_request = facts, lora_request
        self.live: dict[int, Steps[T]] = {}
        self._batches: dict[int, _Running] = {}
        # Index of the generator and position in its batch, by request id.
        self._owners: dict[str, tuple[int, int]] = {}

    def check_idle(self) -> None:
        if self._engine.has_unfinished_requests():
            raise ScoreModeError("llm has unfinished requests; the driver needs an idle engine.")

    def start(
        self, waiting: Iterator[tuple[int, Steps[T]]], concurrency: int
    ) -> Iterator[tuple[int, T]]:
        """Begin generators until so many are live; yield what is finished at once."""
        while len(self.live) < concurrency:
            item = next(waiting, None)
            if item is None:
                return
            index, self.live[item[0]] = item
            yield from self._advance(index)

    def step(self) -> Iterator[tuple[int, T]]:
        """One step of the engine, and what follows from it; yield what is finished then."""
        if not self._engine.get_num_unfinished_requests():
            raise ScoreModeError(
                "the engine lost the driver's requests: llm was used while run_all was running; "
                "take all of its values first."
            )
        finished: list[tuple[int, T]] = []
        try:
            for output in self._engine.step():
                owner = self._owners.pop(output.request_id, None) if output.finished else None
                if owner is not None:
                    finished += self._take(*owner, output)
            for index, error in self._late():
                self._abort(index)
                finished += self._advance(index, error=error)
        except Exception:
            yield from finished  # they are done, whatever became of another
            raise
        yield from finished

    def _late(self) -> list[tuple[int, DeadlineExceeded]]:
        """Generators whose batches are not done in time, and the error for each."""
        now = time.monotonic()
        return [
            (index, too_late(len(batch.unfinished), len(batch.requests.requests)))
            for index, batch in self._batches.items()
            if batch.deadline is not None and batch.deadline <= now
        ]

    def close(self) -> None:
        """Abort what is running, and close the generators."""
        try:
            for index in list(self._batches):
                self._abort(index)
        finally:
            for steps in self.live.values():
                steps.close()
            self.live.clear()

    def _take(self, index: int, position: int, output: Any) -> Iterator[tuple[int, T]]:
        batch = self._batches[index]
        del batch.unfinished[position]
        try:
            batch.requests.take(position, output)
            if batch.unfinished:
                return
            results = batch.requests.results()
        except Exception as error:
            self._abort(index)
            yield from self._advance(index, error=error)
            return
        del self._batches[index]
        yield from self._advance(index, results)

    def _advance(
        self, index: int, results: list[Any] | None = None, error: Exception | None = None
    ) -> Iterator[tuple[int, T]]:
        """Have a generator go on until a batch of it runs, or yield its value."""
        steps = self.live.pop(index)
        while True:
            try:
                if error is not None:
                    batch = steps.throw(error)
                else:
                    batch = next(steps) if results is None else steps.send(results)
            except StopIteration as stop:
                yield index, stop.value
                return
            self.live[index] = steps
            try:
                self._send(index, batch)
                return
            except Exception as problem:
                if ends_everything(problem):
                    raise
                error = problem
                self._abort(index)
                del self.live[index]

    def _send(self, index: int, batch: Batch) -> None:
        if batch.deadline is not None and batch.deadline <= time.monotonic():
            raise DeadlineExceeded(PASSED)
        requests = BatchRequests(batch.work, self._facts)
        running = self._batches[index] = _Running(requests, batch.deadline)
        for position in requests.order:
            request = requests.requests[position]
            request_id = str(next(self._llm.request_counter))
            running.unfinished[position] = self._engine.add_request(
                request_id, request.prompt, request.params, lora_request=self._lora_request
            )
            self._owners[request_id] = index, position

    def _abort(self, index: int) -> None:
        """Forget a generator's batch, if it has one; the engine too."""
        batch = self._batches.pop(index, None)
        if batch is None or not batch.unfinished:
            return
        self._owners = {k: owner for k, owner in self._owners.items() if owner[0] != index}
        self._engine.abort_request(list(batch.unfinished.values()), internal=True)
