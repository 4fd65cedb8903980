"""Training a small Llama on a CPU for about a minute: its recipe, and the optimiser's steps."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from vllm.score.checks import Count, Number, Seed, settings
from vllm.score.errors import ScoreModeError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Raise it when the code changes what a recipe gives: cached models of before are then not used.
_FORMAT = 1
_GRADIENT_NORM = 1.0
_ADAM_BETAS = (0.9, 0.95)
_REPLICAS = 2  # not the number of cores: the same sums on every machine
IGNORED = -100  # as a target: not trained on


@settings
class LlamaRecipe:
    """What every recipe says.

    Attributes:
        hidden_size, intermediate_size, num_layers, head_dim: of the Llama architecture; vLLM's
            attention on CPUs takes heads of 32 and more.
        learning_rate: peak; linear warm-up, then linear to zero.
        weight_decay: of the matrices.
        warmup_fraction: share of the training until the peak, in [0, 1).
        init_std: standard deviation of the initial weights.
        seed: of the initial weights and of the batches.
    """

    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    learning_rate: Number
    weight_decay: Number
    head_dim: Count = 32
    warmup_fraction: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    init_std: Number = 0.05
    seed: Seed = 0

    def key(self, **content: Any) -> str:
        """16 hex digits that change with the recipe, with this code and with `content`."""
        content |= {"format": _FORMAT, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def new_llama(recipe: LlamaRecipe, num_heads: int, **fields: Any) -> LlamaForCausalLM:
    """A model with random weights by the recipe's seed; the caller's random state is put back.

    Args:
        num_heads: of attention, all with keys and values of their own.
        fields: further fields of its `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=recipe.head_dim,
        initializer_range=recipe.init_std,
        **fields,
    )
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def parameter_groups(
    model: LlamaForCausalLM, recipe: LlamaRecipe, embedding_rate_factor: float = 1.0
) -> list[dict[str, Any]]:
    """The parameters and options as AdamW takes them; vectors, as norms are, do not decay.

    Args:
        embedding_rate_factor: how much faster the embedding and the head learn.
    """
    rate = recipe.learning_rate
    matrices: dict[str, Any] = {"params": [], "lr": rate, "weight_decay": recipe.weight_decay}
    ends = matrices | {"params": [], "lr": rate * embedding_rate_factor}
    vectors = matrices | {"params": [], "weight_decay": 0.0}
    for name, weight in model.named_parameters():
        at_an_end = name in ("model.embed_tokens.weight", "lm_head.weight")
        group = vectors if weight.dim() == 1 else ends if at_an_end else matrices
        group["params"].append(weight)
    return [matrices, ends, vectors]


def training_bar(name: str, total: int, progress: bool, **options: Any) -> tqdm:
    """The bar of a training; not shown where standard error is no terminal (tqdm's None)."""
    shown = None if progress else True
    return tqdm(desc=f"training {name} (once)", total=total, disable=shown, **options)


def optimise(
    model: LlamaForCausalLM,
    groups: Iterable[dict[str, Any]],
    batches: Iterable[tuple[int, Callable[[], float]]],
    recipe: LlamaRecipe,
    bar: tqdm,
) -> float:
    """Train by one step of AdamW for each batch, and leave the model in evaluation mode.

    PyTorch's number of threads is put back.

    Args:
        groups: parameters and options as AdamW takes them; "lr" is the peak.
        batches: how far each brings the training, in units of the bar, and what adds the gradient
            of its mean loss to the model's and returns that loss.
        bar: shows how far the training is; its total is the end.

    Returns:
        Mean loss in nats per token over the last tenth of the steps.

    Raises:
        ScoreModeError: where the loss is no longer a number.
    """
    optimiser = torch.optim.AdamW(groups, betas=_ADAM_BETAS, fused=True)
    peaks = [group["lr"] for group in optimiser.param_groups]
    warmup = recipe.warmup_fraction * bar.total
    losses: list[float] = []
    done = 0
    with bar, one_openmp_thread():
        for size, backward in batches:
            # Linear from 0 to 1 over the warm-up, then linear to 0 at the end.
            falling = (bar.total - done) / (bar.total - warmup)
            factor = min(falling, (done + size) / warmup if warmup else 1.0)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = backward()
            if not math.isfinite(loss):
                raise ScoreModeError(
                    f"the loss is {loss} after {len(losses)} steps; lower learning_rate, which is "
                    f"{recipe.learning_rate}"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss)
            done += size
            bar.update(size)
    model.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def add_gradient(
    model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor, scored: int
) -> float:
    """Add the gradient of the summed loss divided by `scored` to the model's gradients.

    Args:
        ids: int64 [rows, length + 1]; the last token of each row is only a target.
        targets: the same ids, or `IGNORED` where they are not trained on.

    Returns:
        That loss, in nats.
    """
    logits = model(ids[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    loss = loss / scored
    loss.backward()
    return loss.item()


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
    """Two copies of a model, with the same weights in memory and gradients of their own, each
    with a thread for its half of a batch.

    On matrices this small OpenMP spends its time waiting at barriers, several in each layer, and on
    a machine that others use as well it comes nearly to a stop (10 times slower was measured). One
    thread for each half of the batch, each with one OpenMP thread, meet once a step. The result
    also no longer depends on the number of cores.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._models = [model]
        for _ in range(_REPLICAS - 1):
            replica = copy.deepcopy(model)
            for weight, twin in zip(model.parameters(), replica.parameters(), strict=True):
                twin.data = weight.data
            self._models.append(replica)
        self._pool = ThreadPoolExecutor(_REPLICAS)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def backward(self, batch: torch.Tensor) -> float:
        """Add the gradient of the mean loss over a batch to the first model's gradients.

        Args:
            batch: int64 [sequences, length + 1].

        Returns:
            The mean loss, in nats per token.
        """
        parts = batch.chunk(_REPLICAS)
        scored = batch[:, 1:].numel()
        models = self._models[: len(parts)]
        losses = list(self._pool.map(add_gradient, models, parts, parts, [scored] * len(parts)))
        for other in models[1:]:
            for weight, twin in zip(models[0].parameters(), other.parameters(), strict=True):
                if weight.grad is not None and twin.grad is not None:
                    weight.grad.add_(twin.grad)
                    twin.grad = None
        return sum(losses)
