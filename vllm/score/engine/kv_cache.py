"""Emptying the KV cache: NaN that a request left there spoils later ones.

Attention that reads whole blocks weighs what lies behind a prompt with 0, and 0 times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def empty_kv_cache(engine_core: Any) -> bool:
    """Forget all cached prefixes and write zeros over all blocks; False where some are in use.

    Called in the engine core between its steps, so no request can be given a block meanwhile.
    """
    if not engine_core.reset_prefix_cache():
        return False
    engine_core.collective_rpc(_write_zeros)
    return True


def _write_zeros(worker: Any) -> None:
    """Called in each worker."""
    for tensor in _tensors(worker.model_runner.kv_caches):
        tensor.zero_()


def _tensors(caches: Any) -> Iterator[torch.Tensor]:
    """Of layers, which have one or, with recurrent states, several."""
    if isinstance(caches, torch.Tensor):
        yield caches
    else:
        for cache in caches.values() if isinstance(caches, dict) else caches:
            yield from _tensors(cache)
