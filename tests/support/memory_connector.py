"""A KV connector that keeps blocks in this process's memory, for engines in this process.

vLLM's own connectors copy with CUDA, but for an example that only knows prompts as a whole. This
one answers as LMCache and others do: it finds all whole blocks that it has, and insists on being
told the number that it found, or 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

# Layer name to keys and values, by the name of the store and a block's hash.
STORES: dict[str, dict[Any, dict[str, torch.Tensor]]] = {}
# Tokens that were loaded, by request.
LOADED: dict[str, int] = {}


@dataclass
class Copies(KVConnectorMetadata):
    """(hash, block) pairs of a step, and the requests whose blocks are loaded."""

    load: list[tuple[Any, int]] = field(default_factory=list)
    save: list[tuple[Any, int]] = field(default_factory=list)
    loading: set[str] = field(default_factory=set)


class MemoryConnector(KVConnectorBase_V1):
    """Options: `store`, a name; `later`, whether to load between two steps."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        get = self._kv_transfer_config.get_from_extra_config
        self.store = STORES.setdefault(get("store", ""), {})
        self.later = get("later", False)
        self.block_size = vllm_config.cache_config.block_size
        self.requests: dict[str, Any] = {}
        self.blocks: dict[str, list[int]] = {}
        self.found: dict[str, tuple[int, int]] = {}
        self.copies = Copies()
        self.layers: dict[str, torch.Tensor] = {}
        self.arrived: set[str] = set()

    # --- in the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        size = self.block_size
        blocks = (request.num_tokens - 1) // size
        hit = next(
            (i for i, key in enumerate(request.block_hashes[:blocks]) if key not in self.store),
            min(blocks, len(request.block_hashes)),
        )
        new = max(hit * size - num_computed_tokens, 0)
        self.found[request.request_id] = num_computed_tokens, new
        return new, self.later and new > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        name = request.request_id
        self.requests[name], self.blocks[name] = request, list(blocks.get_block_ids()[0])
        begin, found = self.found.pop(name, (0, 0))
        if num_external_tokens == 0:
            return
        assert num_external_tokens == found
        LOADED[name] = found
        for i in range(begin // self.block_size, (begin + found) // self.block_size):
            self.copies.load.append((request.block_hashes[i], self.blocks[name][i]))
        self.copies.loading.add(name)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        cached = scheduler_output.scheduled_cached_reqs
        for name, new in zip(cached.req_ids, cached.new_block_ids, strict=True):
            self.blocks[name].extend(new[0] if new else ())
        for name, tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[name]
            complete = (request.num_computed_tokens + tokens) // self.block_size
            pairs = zip(request.block_hashes[:complete], self.blocks[name], strict=False)
            self.copies.save.extend(pair for pair in pairs if pair[0] not in self.store)
        copies, self.copies = self.copies, Copies()
        return copies

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        self.requests.pop(request.request_id, None)
        self.blocks.pop(request.request_id, None)
        return False, None

    # --- in the worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.layers = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        copies = self._get_connector_metadata()
        for key, block in copies.load:
            for name, cache in self.layers.items():
                cache[block] = self.store[key][name]
        self.arrived = copies.loading if self.later else set()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loaded before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Saved behind the last layer."""

    def wait_for_save(self) -> None:
        for key, block in self._get_connector_metadata().save:
            self.store[key] = {n: cache[block].clone() for n, cache in self.layers.items()}

    def get_finished(self, finished_req_ids: Iterable[str]) -> tuple[None, set[str] | None]:
        arrived, self.arrived = self.arrived, set()
        return None, arrived or None
