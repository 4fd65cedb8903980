"""Functions for the worker: hooks on the running model, registered and removed.

Vectors are lists of numbers: to another process they would be sent as such.
"""

from __future__ import annotations

from typing import Any

_HANDLES = "_hooks_of_the_tests"


def steer_layer(worker: Any, vector: list[float]) -> None:
    """Add `vector` to what the first decoder layer gives to the next."""

    def add(module: Any, args: Any, output: Any) -> Any:
        hidden, residual = output
        return hidden + hidden.new_tensor(vector), residual

    _keep(worker, worker.get_model().model.layers[0].register_forward_hook(add))


def steer_head(worker: Any, vector: list[float]) -> None:
    """Add `vector` to the hidden states that the head takes."""

    def add(module: Any, args: Any) -> Any:
        return (args[0] + args[0].new_tensor(vector), *args[1:])

    _keep(worker, worker.get_model().lm_head.register_forward_pre_hook(add))


def bias_head(worker: Any, bias: list[float]) -> None:
    """Add `bias` to the logits; on each worker the part of its own tokens."""

    def add(module: Any, args: Any, output: Any) -> Any:
        first = module.shard_indices.org_vocab_start_index
        return output + output.new_tensor(bias[first : first + output.shape[-1]])

    _keep(worker, worker.get_model().lm_head.register_forward_hook(add))


def bias_logits(worker: Any, bias: list[float]) -> None:
    """Add `bias` to the logits that the model's logits processor gives, of all workers."""

    def add(module: Any, args: Any, output: Any) -> Any:
        return None if output is None else output + output.new_tensor(bias)

    _keep(worker, worker.get_model().logits_processor.register_forward_hook(add))


def remove_hooks(worker: Any) -> int:
    """Undo all of the above; returns how many there were."""
    handles = worker.__dict__.pop(_HANDLES, [])
    for handle in handles:
        handle.remove()
    return len(handles)


def _keep(worker: Any, handle: Any) -> None:
    worker.__dict__.setdefault(_HANDLES, []).append(handle)
