"""Training a Llama of one layer on additions: texts, recipe, and the optimiser's steps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from vllm.score.errors import ScoreModeError
from vllm.score.tiny import additions
from vllm.score.tiny.additions import CUE, END, MAX_TERM, MAX_TERMS, MIN_TERM, MIN_TERMS
from vllm.score.tiny.replicas import one_openmp_thread

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Raise it when the code changes what a recipe gives: cached models of before are then not used.
_FORMAT = 1
_GRADIENT_NORM = 1.0
_ADAM_BETAS = (0.9, 0.95)
_IGNORED = -100  # as a target: not trained on


@dataclass(frozen=True)
class AdditionsRecipe:
    """Everything that decides the weights, besides the libraries.

    Attributes:
        hidden_size, intermediate_size, num_layers, num_heads, head_dim: of the Llama architecture;
            vLLM's attention on CPUs takes heads of 32 and more.
        steps, sequences: optimiser steps, and texts in each.
        learning_rate: peak; linear warm-up, then linear to zero.
        warmup_fraction: share of the steps until the peak, in [0, 1).
        weight_decay: of the matrices.
        init_std: standard deviation of the initial weights.
        cut_fraction: share of the texts whose reasoning is cut off at a random place and
            followed by the cue and the answer; the others end with the whole reasoning.
        slip_fraction: share of the whole reasonings (and slip_fraction_cut, of the cut ones) in
            which one sum is replaced by any other number, from which the next ones go on. The
            replaced sum is not trained on. From correct sums alone the model learns to ignore what
            it has written: here, an average of the terms tells each sum nearly as well.
        seed: of the initial weights and of the texts.
    """

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 1
    num_heads: int = 2
    head_dim: int = 32
    steps: int = 1500
    sequences: int = 64
    learning_rate: float = 1.5e-2
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    init_std: float = 0.05
    cut_fraction: float = 0.5
    slip_fraction: float = 0.5
    slip_fraction_cut: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_heads", "steps", "sequences"):
            if getattr(self, name) < 1:
                raise ScoreModeError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ScoreModeError(
                f"warmup_fraction is {self.warmup_fraction}; it must be at least 0 and below 1"
            )
        for name in ("cut_fraction", "slip_fraction", "slip_fraction_cut"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ScoreModeError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")

    def key(self) -> str:
        """16 hex digits that change with the recipe and with this code."""
        content = {"format": _FORMAT, "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def train(
    recipe: AdditionsRecipe, tokenizer: PreTrainedTokenizerFast, *, progress: bool = True
) -> tuple[LlamaForCausalLM, float]:
    """Train from scratch, in float32 on one CPU core.

    The same recipe, library versions and kind of processor give the same weights to the last bit.
    The caller's random state and PyTorch's number of threads are put back.

    Returns:
        The model in evaluation mode, and its mean loss in nats a token over the last tenth of the
        steps.

    Raises:
        ScoreModeError: where the loss is no longer a number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe, tokenizer)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=_ADAM_BETAS,
        fused=True,
    )
    losses: list[float] = []
    # Where standard error is no terminal, tqdm's None leaves the bar out.
    bar = tqdm(
        batches(recipe, tokenizer),
        desc="training the model for additions (once)",
        total=recipe.steps,
        disable=None if progress else True,
    )
    with bar, one_openmp_thread():
        for ids, targets in bar:
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * _rate_factor(len(losses), recipe)
            logits = model(torch.from_numpy(ids[:, :-1]), use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), torch.from_numpy(targets[:, 1:]).flatten()
            )
            if not math.isfinite(loss.item()):
                raise ScoreModeError(
                    f"the loss is {loss.item()} after {len(losses)} steps; lower learning_rate, "
                    f"which is {recipe.learning_rate}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
    return model.eval(), float(np.mean(losses[-max(1, len(losses) // 10) :]))


def batches(
    recipe: AdditionsRecipe, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The training texts, one batch a step.

    A text is a question and either the whole reasoning and the end-of-sequence token, or some of
    the reasoning, the cue, the answer and its end. What is trained on are the tokens that a model
    has to give by itself: not the question, not the cue, not a sum that was replaced.

    Yields:
        Token ids and targets, int64 [sequences, 19] each. Targets are the same ids, or -100 where
        they are not trained on.
    """
    vocabulary = tokenizer.get_vocab()

    def tokens(texts: list[str]) -> np.ndarray:
        return np.array([vocabulary[text] for text in texts], dtype=np.int64)

    terms = range(MIN_TERM, MAX_TERM + 1)
    first = tokens([additions.first_term(term) for term in terms])
    further = tokens([additions.further_term(term) for term in terms])
    lowest, highest = MIN_TERMS * MIN_TERM, MAX_TERMS * MAX_TERM
    sums = tokens([additions.running_sum(total) for total in range(lowest, highest + 1)])
    (missing, equals, cue, end) = tokens([".", "=", CUE.rstrip(), END])

    random = np.random.default_rng(recipe.seed)
    rows = recipe.sequences
    for _ in range(recipe.steps):
        count = random.integers(MIN_TERMS, MAX_TERMS + 1, (rows, 1))
        drawn = random.integers(MIN_TERM, MAX_TERM + 1, (rows, MAX_TERMS))
        present = np.arange(MAX_TERMS) < count
        question = np.where(present, further[drawn - MIN_TERM], missing)
        question[:, 0] = first[drawn[:, 0] - MIN_TERM]

        cut = random.random((rows, 1)) < recipe.cut_fraction
        share = np.where(cut, recipe.slip_fraction_cut, recipe.slip_fraction)
        written, slip = _running_sums(drawn * present, count, share, random)
        # How many sums are written: all, or a number that leaves the replaced one in.
        kept = np.where(cut, random.integers(slip + 1, count), count - 1)
        place = np.arange(MAX_TERMS + 2)  # behind the question
        # Places beyond the last sum hold it once more: they are the answer.
        behind = sums[np.pad(written, ((0, 0), (0, 3)), mode="edge") - lowest]
        answer = sums[written[:, -1:] - lowest]
        after = place - kept
        reply = np.select(
            [after < 0, ~cut & (after == 0), cut & (after == 0), cut & (after == 1)],
            [behind, tokenizer.eos_token_id, cue, answer],
            np.where(cut & (after == 2), end, tokenizer.pad_token_id),
        )
        trained = (after < np.where(cut, 3, 1)) & (place != slip) & ~(cut & (after == 0))
        ids = np.hstack([question, np.full((rows, 1), equals), reply])
        targets = np.full_like(ids, _IGNORED)
        targets[:, MAX_TERMS + 1 :][trained] = reply[trained]
        yield ids, targets


def _running_sums(
    terms: np.ndarray, count: np.ndarray, share: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Running sums, in a share of the rows with one of them replaced.

    Args:
        terms: int64 [rows, 8], 0 where there is none.
        count: int64 [rows, 1], number of terms.
        share: [rows, 1], probability that a sum is replaced. The last one never is.

    Returns:
        Sums int64 [rows, 7], the last one repeated to the end of the row; and int64 [rows, 1],
        which one was replaced, or -1.
    """
    totals = np.cumsum(terms, axis=1)[:, 1:]
    replaced = (random.random(count.shape) < share) & (count > MIN_TERMS)
    slip = np.where(replaced, random.integers(0, np.maximum(count - 2, 1)), -1)
    at_slip = np.take_along_axis(totals, np.maximum(slip, 0), axis=1)
    # Any number from which the last sum stays within the vocabulary.
    most = MAX_TERMS * MAX_TERM - (totals[:, -1:] - at_slip)
    shift = random.integers(MIN_TERMS * MIN_TERM, most + 1) - at_slip
    behind = replaced & (np.arange(MAX_TERMS - 1) >= slip)
    return np.where(behind, totals + shift, totals), slip


def _rate_factor(step: int, recipe: AdditionsRecipe) -> float:
    """Linear from 0 to 1 over the warm-up, then linear to 0 behind the last step."""
    warmup = recipe.warmup_fraction * recipe.steps
    falling = (recipe.steps - step) / (recipe.steps - warmup)
    return min(falling, (step + 1) / warmup if warmup else 1.0)


def _new_model(recipe: AdditionsRecipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=256,
        initializer_range=recipe.init_std,
        # A sum that was read and one that is to be written are then the same vector.
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)
