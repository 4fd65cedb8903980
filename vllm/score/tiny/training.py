"""Training a small Llama on a CPU for about a minute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.recipe import Phase, Recipe
from vllm.score.tiny.replicas import Replicas, one_openmp_thread

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_GRADIENT_NORM = 1.0
_ADAM_BETAS = (0.9, 0.95)


def train(
    token_ids: np.ndarray, recipe: Recipe, *, bos: int, eos: int, progress: bool = True
) -> tuple[LlamaForCausalLM, float]:
    """Train a Llama-style model from scratch, in float32 on the CPU.

    The same recipe, text, library versions and kind of processor give the same weights to the
    last bit, whatever the number of cores; two are used. The caller's random state and PyTorch's
    number of threads are put back.

    Args:
        token_ids: int64 [n], the training text as one stream.
        recipe: sizes, batches and rates.
        bos, eos: ids of the special tokens, for the configuration.
        progress: whether to show a bar on standard error.

    Returns:
        The model in evaluation mode, and its mean loss in nats a token over the last tenth of
        the steps.

    Raises:
        ScoreModeError: where the text is too short for a sequence of the recipe, or the loss is
            no longer a number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe, bos, eos)
    losses = _optimise(model, token_ids, recipe, progress)
    tail = losses[-max(1, len(losses) // 10) :]
    return model.eval(), float(np.mean(tail))


def held_out_nats(model: LlamaForCausalLM, token_ids: np.ndarray, window: int) -> tuple[float, int]:
    """Negative log-likelihood of a stream in windows that do not overlap.

    Args:
        token_ids: int64 [n].
        window: tokens a window; the first token of each window is context alone.

    Returns:
        Sum in nats (accumulated in float64) and number of scored tokens.
    """
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, window):
        ids = torch.from_numpy(token_ids[start : start + window])[None]
        if ids.shape[1] < 2:
            break
        with torch.no_grad(), one_openmp_thread():
            logits = model(ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), ids[0, 1:], reduction="sum")
        total += loss.item()
        count += ids.shape[1] - 1
    return total, count


def _new_model(recipe: Recipe, bos: int, eos: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = recipe.hidden_size // recipe.head_dim
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_position_embeddings,
        initializer_range=recipe.init_std,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # What the layers add to the residual stream starts small, as in GPT-2.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 / math.sqrt(2 * recipe.num_layers))
    return model


def _optimise(
    model: LlamaForCausalLM, token_ids: np.ndarray, recipe: Recipe, progress: bool
) -> list[float]:
    optimiser = _optimiser(model, recipe)
    rates = [group["lr"] for group in optimiser.param_groups]
    losses: list[float] = []
    # Where standard error is no terminal, tqdm's None leaves the bar out.
    bar = tqdm(
        desc="training the embedded model (once)",
        total=recipe.tokens,
        unit="tok",
        unit_scale=True,
        disable=None if progress else True,
    )
    with bar, one_openmp_thread(), closing(Replicas(model)) as replicas:
        seen = 0
        for batch in _batches(token_ids, recipe):
            tokens = batch[:, 1:].numel()
            factor = _rate_factor(seen, seen + tokens, recipe)
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            loss = replicas.backward(batch)
            if not math.isfinite(loss):
                raise ScoreModeError(
                    f"the loss is {loss} after {seen} tokens; lower learning_rate, which is "
                    f"{recipe.learning_rate}"
                )
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss)
            seen += tokens
            bar.update(tokens)
    return losses


def _optimiser(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    ends = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    chosen = {id(p) for p in [*ends, *vectors]}
    matrices = [p for p in model.parameters() if id(p) not in chosen]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": ends, "lr": rate * recipe.embedding_rate_factor, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=_ADAM_BETAS, fused=True)


def _rate_factor(before: int, after: int, recipe: Recipe) -> float:
    """Linear from 0 to 1 over the warm-up, then linear to 0 at the last token.

    Counted in tokens, not in steps: the long sequences at the end come in few, large steps, and
    would else be seen when hardly anything is learned any more.
    """
    warmup = recipe.warmup_fraction * recipe.tokens
    falling = (recipe.tokens - before) / (recipe.tokens - warmup)
    return min(falling, after / warmup if warmup else 1.0)


def _batches(token_ids: np.ndarray, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Batches [sequences, length + 1]; the last token of each row is only a target."""
    order = np.random.default_rng(recipe.seed)
    for phase in recipe.phases:
        starts = _starts(len(token_ids), phase, order)
        for _ in range(phase.steps):
            rows = [next(starts) for _ in range(phase.sequences)]
            stacked = np.stack([token_ids[s : s + phase.sequence_length + 1] for s in rows])
            yield torch.from_numpy(stacked)


def _starts(tokens: int, phase: Phase, order: np.random.Generator) -> Iterator[int]:
    """Starts of sequences: epoch after epoch, shuffled, each cut at another offset."""
    length = phase.sequence_length
    if tokens < 2 * length + 1:
        raise ScoreModeError(
            f"the training text has {tokens} tokens; sequences of {length} need at least "
            f"{2 * length + 1}: use more text or shorter sequences"
        )
    while True:
        starts = np.arange(int(order.integers(length)), tokens - length, length)
        order.shuffle(starts)
        yield from starts.tolist()
