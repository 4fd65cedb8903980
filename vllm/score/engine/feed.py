"""Sending requests to the engine of an `LLM`, in which order, and taking what comes back."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm.score.engine.request import AdmittedRequest
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

# Enough to keep any engine full, few enough that a long list costs no memory before its turn.
MAX_REQUESTS_IN_FLIGHT = 4096
MAX_TOKENS_IN_FLIGHT = 1 << 20
# Shorter prefixes are not worth another order: they fill no block of the cache.
SHARED_TOKENS = 16
# Sent before the engine begins, at most: more would keep it waiting for us.
HELD_REQUESTS = 256


class _Hold:
    """Keeps an engine in another process from its first step until there is a step's work.

    It would begin with the one request that arrives first: a step for a single context, and
    another batch each time.
    """

    def __init__(self, engine: Any, everything: bool, shares: bool) -> None:
        self._engine, self._everything, self._shares = engine, everything, shares
        self._step = engine.vllm_config.scheduler_config.max_num_batched_tokens
        self._tokens = self._requests = 0
        self._last: np.ndarray | None = None
        # An engine in this process runs only when it is told to; ranks of data parallelism pause
        # and go on together, which is not ours to do.
        alone = engine.vllm_config.parallel_config.data_parallel_size == 1
        self.on = alone and not hasattr(engine.engine_core, "engine_core")
        if self.on:
            engine.sleep(level=0, mode="keep")

    def sent(self, ids: np.ndarray) -> None:
        """Count a request: what it does not share with the one before it."""
        if not self.on or self._everything:
            return
        shared = common_prefix(self._last, ids) if self._shares and self._last is not None else 0
        self._tokens += len(ids) - shared
        self._requests += 1
        self._last = ids
        if self._tokens >= self._step or self._requests >= HELD_REQUESTS:
            self.release()

    def release(self) -> None:
        if self.on:
            self.on = False
            self._engine.wake_up(tags=["scheduling"])


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens that two arrays of ids, [n] and [m], begin with in common."""
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    return int(different.argmax()) if different.any() else shorter


def shared_prefix_order(prompts: Sequence[np.ndarray]) -> list[int]:
    """Indices of `prompts`, those that share a prefix next to each other.

    The engine computes a prefix once while its blocks stay in the cache, from the step on in which
    they are first computed. Neighbours find them there however small the cache is.

    Groups that share at least `SHARED_TOKENS` tokens stay in the order of their first members. In
    a group the order is that of the token ids, so that longer shared prefixes are adjacent too.
    The order is unchanged where nothing is shared.

    Args:
        prompts: arrays of token ids, [n] each, of one dtype.
    """
    groups: dict[bytes, list[int]] = {}
    for i, prompt in enumerate(prompts):
        # Prompts too short to share so much are groups of their own.
        long_enough = len(prompt) >= SHARED_TOKENS
        prefix = prompt[:SHARED_TOKENS].tobytes() if long_enough else b"%d" % i
        groups.setdefault(prefix, []).append(i)

    # Bytes compare fast; big-endian ones compare like the numbers.
    def key(i: int) -> bytes:
        return prompts[i].astype(">i4").tobytes()

    return [
        i
        for group in groups.values()
        for i in (group if len(group) == 1 else sorted(group, key=key))
    ]


def run_requests(
    llm: LLM,
    requests: Sequence[AdmittedRequest],
    order: Sequence[int],
    adapters: Sequence[LoRARequest | None],
    queue_first: bool,
) -> Generator[tuple[int, Any], None, None]:
    """Yield (index, output) as requests finish; whatever is unfinished at an error is aborted.

    Args:
        requests: of a call, with equal options.
        order: indices of `requests`, in which they are sent.
        adapters: of each request.
        queue_first: let the engine begin only when all requests have reached it.

    Raises:
        ScoreModeError: the engine is busy.
    """
    engine = llm.llm_engine
    if engine.has_unfinished_requests():
        raise ScoreModeError("llm has unfinished requests; score() needs an idle engine.")
    if not order:
        return
    waiting = list(reversed(order))
    running: dict[str, tuple[int, str]] = {}  # index and internal id by request id
    tokens_in_flight = 0
    shares = not requests[order[0]].params.skip_reading_prefix_cache
    hold = _Hold(engine, queue_first, shares)
    try:
        while waiting or running:
            while (
                waiting
                and len(running) < MAX_REQUESTS_IN_FLIGHT
                and tokens_in_flight < MAX_TOKENS_IN_FLIGHT
            ):
                index = waiting.pop()
                request, request_id = requests[index], str(next(llm.request_counter))
                internal_id = engine.add_request(
                    request_id, request.prompt, request.params, lora_request=adapters[index]
                )
                running[request_id] = index, internal_id
                tokens_in_flight += len(request.ids)
                hold.sent(request.ids)
            hold.release()
            for output in engine.step():
                if output.finished and output.request_id in running:
                    index, _ = running.pop(output.request_id)
                    tokens_in_flight -= len(requests[index].ids)
                    yield index, output
    finally:
        hold.release()
        if running:
            engine.abort_request(
                [internal_id for _, internal_id in running.values()], internal=True
            )
