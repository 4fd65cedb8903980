"""Many decisions side by side on an `AsyncLLM`, beside its other clients."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vllm.score.eig.drivers.checks import whole
from vllm.score.eig.drivers.engine import PASSED, check_adapter, too_late
from vllm.score.eig.drivers.requests import BatchRequests, EngineRequest, facts_of
from vllm.score.eig.work import Batch, DeadlineExceeded, Steps, ends_everything
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

T = TypeVar("T")


class AsyncDriver:
    """Runs generators of batches on an `AsyncLLM`, which may have other requests.

    Args:
        async_llm: the engine.
        tokenizer: of the model; by default the engine's.
        concurrency: generators that `run_all` has live at once.
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
        check_adapter(async_llm, lora_request)
        self.tokenizer: Any = async_llm.get_tokenizer() if tokenizer is None else tokenizer
        self._engine = async_llm
        self._facts = facts_of(async_llm)
        self._concurrency = whole("concurrency", concurrency, 1)
        self._lora_request = lora_request

    async def run(self, batch: Batch) -> list[Any]:
        """The results of one batch, in the order of its work.

        Where it fails or is cancelled, its requests are aborted.

        Raises:
            DeadlineExceeded: it was not done in time.
            ScoreModeError: the work is malformed, or it failed.
        """
        left = None if batch.deadline is None else batch.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise DeadlineExceeded(PASSED)
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
            raise too_late(len(unfinished), len(requests.requests)) from None
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first one; it had the others cancelled
        finally:
            if unfinished:
                # One that was cancelled while it was being added is not aborted by `generate`.
                await asyncio.shield(self._engine.abort(list(unfinished.values())))
        return requests.results()

    async def drive(self, steps: Steps[T]) -> T:
        """Run one generator to its end; what goes wrong in a batch is thrown into it."""
        try:
            batch = next(steps)
            while True:
                try:
                    results = await self.run(batch)
                except Exception as error:
                    if ends_everything(error):
                        raise
                    batch = steps.throw(error)
                else:
                    batch = steps.send(results)
        except StopIteration as stop:
            return stop.value
        finally:
            steps.close()

    async def run_all(self, problems: Iterable[Steps[T]]) -> AsyncGenerator[tuple[int, T], None]:
        """Yield (index, value) of generators as they finish.

        Of `problems` no more are taken than run. An exception that leaves a generator leaves here.
        However this ends, what is still running is aborted; close it (`contextlib.aclosing`) where
        it is left early.
        """
        waiting = enumerate(problems)
        running: dict[asyncio.Task[T], int] = {}
        try:
            while True:
                while len(running) < self._concurrency:
                    item = next(waiting, None)
                    if item is None:
                        break
                    running[asyncio.create_task(self.drive(item[1]))] = item[0]
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
        request: EngineRequest = requests.requests[position]
        output: Any = None
        async for latest in self._engine.generate(
            request.prompt, request.params, unfinished[position], lora_request=self._lora_request
        ):
            output = latest
        del unfinished[position]
        if output is None:
            raise ScoreModeError("the engine ended a request without an output; ask again.")
        requests.take(position, output)
