"""Small Llamas that are trained on a CPU for about a minute, once, and kept in the user's cache.

Their recipe, the optimiser's steps, and the cache, in which a model is there whole or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from vllm.score.checks import Count, Number, Seed, settings
from vllm.score.errors import ScoreModeError
from vllm.score.launch.engine import long_step, say

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

# Raise it when the code changes what a recipe gives: cached models of before are then not used.
_FORMAT = 1
_GRADIENT_NORM = 1.0
_ADAM_BETAS = (0.9, 0.95)
IGNORED = -100  # as a target: not trained on

CACHE_VARIABLE = "VLLM_SCORE_CACHE"
MODEL = "model"
_FACTS, _RECIPE = "facts.json", "recipe.json"
# What must be there for a model to be used: all of it comes at once, but a user may have deleted
# some since.
_FILES = (f"{MODEL}/config.json", f"{MODEL}/model.safetensors", f"{MODEL}/tokenizer.json", _FACTS)


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

    kind: ClassVar[str]  # the cache's subfolder
    name: ClassVar[str]  # of what is made, in sentences
    begins: ClassVar[str]  # what is said before, with how long it takes
    files: ClassVar[tuple[str, ...]] = ()  # beside the model; without them it is made anew

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


def check_heads(hidden_size: int, head_dim: int) -> None:
    """Raise ScoreModeError for heads that do not fill a hidden state."""
    if hidden_size % head_dim:
        raise ScoreModeError(
            f"hidden_size is {hidden_size}; it must be a multiple of head_dim, {head_dim}"
        )


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


def optimise(
    model: LlamaForCausalLM,
    batches: Iterable[tuple[int, np.ndarray, np.ndarray]],
    recipe: LlamaRecipe,
    total: int,
    progress: bool,
    *,
    replicas: int = 1,
    embedding_rate_factor: float = 1.0,
    **bar_options: Any,
) -> float:
    """Train by one step of AdamW for each batch, and leave the model in evaluation mode.

    Vectors, as norms are, do not decay. PyTorch's number of threads is put back.

    Args:
        batches: how far each brings the training, out of `total`; token ids and targets, int64
            [rows, length + 1] each; see `Replicas.backward`.
        progress: show a bar, where standard error is a terminal.
        replicas: threads that share a batch; not the number of cores, for the same sums everywhere.
        embedding_rate_factor: how much faster the embedding and the head learn.
        bar_options: of tqdm.

    Returns:
        Mean loss in nats per token over the last tenth of the steps.

    Raises:
        ScoreModeError: where the loss is no longer a number.
    """
    rate = recipe.learning_rate
    matrices: dict[str, Any] = {"params": [], "lr": rate, "weight_decay": recipe.weight_decay}
    ends = matrices | {"params": [], "lr": rate * embedding_rate_factor}
    vectors = matrices | {"params": [], "weight_decay": 0.0}
    for name, weight in model.named_parameters():
        at_an_end = name in ("model.embed_tokens.weight", "lm_head.weight")
        group = vectors if weight.dim() == 1 else ends if at_an_end else matrices
        group["params"].append(weight)
    groups = [matrices, ends, vectors]
    optimiser = torch.optim.AdamW(groups, betas=_ADAM_BETAS, fused=True)
    peaks = [group["lr"] for group in optimiser.param_groups]
    shown, warmup = None if progress else True, recipe.warmup_fraction * total
    bar = tqdm(desc=f"training {recipe.name} (once)", total=total, disable=shown, **bar_options)
    losses: list[float] = []
    done = 0
    with bar, one_openmp_thread(), closing(Replicas(model, replicas)) as copies:
        for size, ids, targets in batches:
            # Linear from 0 to 1 over the warm-up, then linear to 0 at the end.
            falling = (total - done) / (total - warmup)
            factor = min(falling, (done + size) / warmup if warmup else 1.0)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            loss = copies.backward(torch.from_numpy(ids), torch.from_numpy(targets))
            if not math.isfinite(loss):
                raise ScoreModeError(
                    f"the loss is {loss} after {len(losses)} steps; lower learning_rate, which is "
                    f"{rate}"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss)
            done += size
            bar.update(size)
    model.eval()
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


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
    """Copies of a model, with the same weights in memory and gradients of their own, each with a
    thread for its part of a batch.

    On matrices this small OpenMP spends its time waiting at barriers, several in each layer, and on
    a machine that others use as well it comes nearly to a stop (10 times slower was measured). One
    thread for each part of the batch, each with one OpenMP thread, meet once a step. The result
    also no longer depends on the number of cores.
    """

    def __init__(self, model: LlamaForCausalLM, count: int) -> None:
        self._models = [model]
        for _ in range(count - 1):
            replica = copy.deepcopy(model)
            for weight, twin in zip(model.parameters(), replica.parameters(), strict=True):
                twin.data = weight.data
            self._models.append(replica)
        self._pool = ThreadPoolExecutor(count)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def backward(self, ids: torch.Tensor, targets: torch.Tensor) -> float:
        """Add the gradient of the mean loss over a batch to the first model's gradients.

        Args:
            ids: int64 [rows, length + 1]; the last token of each row is only a target.
            targets: the same ids, or `IGNORED` where they are not trained on.

        Returns:
            The mean loss, in nats per token.
        """
        scored = int((targets[:, 1:] != IGNORED).sum())

        def add_gradient(
            model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor
        ) -> float:
            logits = model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / scored
            loss.backward()
            return loss.item()

        count = len(self._models)
        parts = ids.chunk(count), targets.chunk(count)
        losses = list(self._pool.map(add_gradient, self._models, *parts))
        for other in self._models[1 : len(losses)]:
            for weight, twin in zip(self._models[0].parameters(), other.parameters(), strict=True):
                if weight.grad is not None and twin.grad is not None:
                    weight.grad.add_(twin.grad)
                    twin.grad = None
        return sum(losses)


# --- the cache


class Made(NamedTuple):
    """What a build gives: `facts` tell how it went; versions and seconds are added to them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    facts: dict[str, Any]


def default_cache_dir() -> Path:
    """Where this package keeps what it makes.

    What the environment variable VLLM_SCORE_CACHE names, else the user's cache directory (on
    Linux XDG_CACHE_HOME, or ~/.cache).
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("vllm-score")


def make_once(
    recipe: LlamaRecipe, build: Callable[[Path], Made], cache_dir: Path | None, progress: bool
) -> tuple[Path, dict[str, Any]]:
    """Make a model unless the cache has it already.

    It is built beside its place and appears there by one rename, when it is complete: a run that is
    killed leaves nothing that a later one would use. Of two processes at once, the second waits
    for the first.

    Args:
        recipe: its key names the folder; it is saved there as `recipe.json`.
        build: makes the model; it may write files to the folder that it is given.
        cache_dir: by default `default_cache_dir()`.
        progress: whether to say what is made, the time that it took, and that another process is
            waited for.

    Returns:
        The folder, with the model and its tokenizer in its subfolder `MODEL`, and the facts.

    Raises:
        ScoreModeError: where the cache cannot be written.
    """
    target = Path(cache_dir or default_cache_dir()) / recipe.kind / recipe.key()

    def complete() -> bool:
        return all((target / file).is_file() for file in (*_FILES, *recipe.files))

    try:
        if not complete():
            with _locked(target, recipe.name, progress):
                if not complete():
                    with long_step(recipe.begins, f"Made {recipe.name}", progress):
                        _make(target, recipe, build)
        return target, json.loads((target / _FACTS).read_text())
    except OSError as error:
        raise ScoreModeError(
            f"{recipe.name} cannot be made in {target.parent} ({error}); set {CACHE_VARIABLE} "
            "to a folder that can be written"
        ) from error


def _locked(target: Path, name: str, progress: bool) -> AbstractContextManager[Any]:
    """The right to make this folder; the system takes it back from a process that dies."""
    import filelock

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(target.parent / f"{target.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"Another process is making {name}; waiting for it", progress)
        return lock.acquire()


def _make(target: Path, recipe: LlamaRecipe, build: Callable[[Path], Made]) -> None:
    """Build beside the target, then rename. Called with the lock held."""
    started = time.perf_counter()
    prefix = f".{target.name}."
    for left in target.parent.glob(f"{prefix}*"):  # of runs that were killed: nobody has the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=target.parent, ignore_cleanup_errors=True
    ) as folder:
        building = Path(folder)
        model, tokenizer, facts = build(building)
        save_model(model, tokenizer, building / MODEL)
        facts = {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            **facts,
            "seconds": round(time.perf_counter() - started, 1),
            "versions": {
                "python": platform.python_version(),
                **{library: version(library) for library in ("torch", "transformers")},
            },
        }
        for file, content in ((_RECIPE, asdict(recipe)), (_FACTS, facts)):
            (building / file).write_text(json.dumps(content, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        building.rename(target)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save both to `folder`, without Hugging Face's progress bar (its setting is put back)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
