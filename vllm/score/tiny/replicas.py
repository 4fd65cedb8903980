"""Two threads that share one model's weights and split each batch.

On matrices this small OpenMP spends its time waiting at barriers, several in each layer, and on a
machine that others use as well it comes nearly to a stop (10 times slower was measured). One
thread for each half of the batch, each with one OpenMP thread, meet once a step. The result also
no longer depends on the number of cores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_REPLICAS = 2  # not the number of cores: the same sums on every machine


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Inside, PyTorch uses one OpenMP thread for each thread of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Replicas:
    """Copies of a model with the same weights in memory and gradients of their own."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._models = [model, *(_sharing_copy(model) for _ in range(_REPLICAS - 1))]
        self._pool = ThreadPoolExecutor(_REPLICAS)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def backward(self, batch: torch.Tensor) -> float:
        """Add the gradient of the mean loss over a batch to the first model's gradients.

        Args:
            batch: int64 [sequences, length + 1].

        Returns:
            The mean loss, in nats a token.
        """
        scored = batch[:, 1:].numel()
        parts = batch.chunk(_REPLICAS)
        jobs = [
            self._pool.submit(_backward, model, part, scored)
            for model, part in zip(self._models, parts, strict=False)
        ]
        losses = [job.result() for job in jobs]
        first, *others = self._models
        for other in others[: len(parts) - 1]:
            for weight, twin in zip(first.parameters(), other.parameters(), strict=True):
                if weight.grad is not None and twin.grad is not None:
                    weight.grad.add_(twin.grad)
                    twin.grad = None
        return sum(losses)


def _backward(model: LlamaForCausalLM, part: torch.Tensor, scored: int) -> float:
    logits = model(part[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
    )
    loss = loss / scored
    loss.backward()
    return loss.item()


def _sharing_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    replica = copy.deepcopy(model)
    for weight, twin in zip(model.parameters(), replica.parameters(), strict=True):
        twin.data = weight.data
    return replica
