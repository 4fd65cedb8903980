"""A prefix-cache hit of a score request ends before its first scored row."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import wrapt

from vllm.score.patches.patch import Patch


class CappedRequest(wrapt.ObjectProxy):
    """A request whose `num_tokens`, less one, is the longest hit that keeps every score."""

    @property
    def num_tokens(self) -> int:
        return int(self.__wrapped__.sampling_params._score.start) + 1


def apply(module: ModuleType) -> None:
    """Wrap the look-up."""

    def get_computed_blocks(wrapped: Any, manager: Any, args: Any, kwargs: Any) -> Any:
        def call(request: Any) -> Any:
            params = request.sampling_params
            if params is None or not params.score_mode:
                return wrapped(request)
            if params._score.start == 0:
                return manager.empty_kv_cache_blocks, 0, 0
            return wrapped(CappedRequest(request))

        return call(*args, **kwargs)

    wrapt.wrap_function_wrapper(module, "KVCacheManager.get_computed_blocks", get_computed_blocks)


PATCH = Patch(
    target="vllm.v1.core.kv_cache_manager",
    contract={"KVCacheManager.get_computed_blocks": ("self", "request")},
    apply=apply,
    roles=("engine core",),
    why="A cached position has no hidden state, so no score.",
    how="The stock look-up leaves the last token of a request uncached; a proxy makes the first "
    "scored row that token. Alignment and hybrid models stay upstream's business.",
    risk="A look-up that stops reading num_tokens would hit too far: rows stay unwritten, and the "
    "front end reports them as an error.",
    upstream="Pull request: max_cache_hit_length from prompt_logprob_start.",
    remove_when="get_computed_blocks respects prompt_logprob_start.",
)
