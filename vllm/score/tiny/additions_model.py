"""The model that has learned additions: made once and kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from vllm.score.checks import Count, Number, settings
from vllm.score.tiny.additions import (
    CUE,
    END,
    EQUALS,
    MAX_TERM,
    MAX_TERMS,
    MIN_TERM,
    MIN_TERMS,
    MISSING,
    SUMS,
    TERMS,
    tokenizer,
)
from vllm.score.tiny.cache import MODEL, Made, make_once
from vllm.score.tiny.training import (
    IGNORED,
    LlamaRecipe,
    add_gradient,
    new_llama,
    optimise,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_Share = Annotated[Number, Field(ge=0, le=1)]


@settings
class AdditionsRecipe(LlamaRecipe):
    """Everything that decides the weights, besides the libraries.

    Attributes:
        num_heads: of attention.
        steps, sequences: optimiser steps, and texts in each.
        cut_fraction: share of the texts whose reasoning is cut off at a random place and
            followed by the cue and the answer; the others end with the whole reasoning.
        slip_fraction: share of the whole reasonings (and slip_fraction_cut, of the cut ones) in
            which one sum is replaced by any other number, from which the next ones go on. The
            replaced sum is not trained on. From correct sums alone the model learns to ignore what
            it has written: here, an average of the terms tells each sum nearly as well.
    """

    hidden_size: Count = 64
    intermediate_size: Count = 128
    num_layers: Count = 1
    num_heads: Count = 2
    steps: Count = 1500
    sequences: Count = 64
    learning_rate: Number = 1.5e-2
    weight_decay: Number = 0.01
    cut_fraction: _Share = 0.5
    slip_fraction: _Share = 0.5
    slip_fraction_cut: _Share = 0.15


@dataclass(frozen=True)
class AdditionsModel:
    """A model made on this machine, for the task of `vllm.score.tiny.additions`.

    Attributes:
        directory: the model and its tokenizer, as Hugging Face and vLLM load them, in float32.
        facts: how it was made and what came out, as in `facts.json`.
    """

    directory: Path
    facts: Mapping[str, Any]


def additions_model(
    cache_dir: Path | None = None,
    progress: bool = True,
    *,
    recipe: AdditionsRecipe | None = None,
) -> AdditionsModel:
    """The model for additions; made on the first call (under a minute on one core), then read.

    In the cache it is there whole or not at all, whoever else makes it (`vllm.score.tiny.cache`).
    A changed recipe makes another model.

    Args:
        cache_dir: by default what the environment variable VLLM_SCORE_CACHE names, else the
            user's cache directory (on Linux XDG_CACHE_HOME, or ~/.cache).
        progress: whether to say on standard error that the model is being made, with a bar.
        recipe: another recipe than the default, e.g. for tests.

    Raises:
        ScoreModeError: where the cache cannot be written.
    """
    recipe = recipe or AdditionsRecipe()
    folder, facts = make_once(
        recipe,
        lambda _: _build(recipe, progress),
        kind="additions",
        name="the model for additions",
        begins="Making the model for additions (once; under a minute on one core)",
        cache_dir=cache_dir,
        progress=progress,
    )
    return AdditionsModel(folder / MODEL, facts)


def _build(recipe: AdditionsRecipe, progress: bool) -> Made:
    words = tokenizer()
    model, loss = train(recipe, words, progress=progress)
    facts = {
        "training_steps": recipe.steps,
        "training_texts": recipe.steps * recipe.sequences,
        "training_loss_nats": loss,
    }
    return Made(model, words, facts)


def train(
    recipe: AdditionsRecipe, tokenizer: PreTrainedTokenizerFast, *, progress: bool = True
) -> tuple[LlamaForCausalLM, float]:
    """Train from scratch, in float32 on one CPU core.

    The same recipe, library versions and kind of processor give the same weights to the last bit.
    The caller's random state and PyTorch's number of threads are put back.

    Returns:
        The model in evaluation mode, and its mean loss in nats per token over the last tenth of the
        steps.

    Raises:
        ScoreModeError: where the loss is no longer a number.
    """
    model = new_llama(
        recipe,
        recipe.num_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        # A sum that was read and one that is to be written are then the same vector.
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    matrices: dict[str, Any] = {"params": [w for w in model.parameters() if w.dim() > 1]}
    matrices |= {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    vectors = matrices | {"params": [w for w in model.parameters() if w.dim() == 1]}
    vectors["weight_decay"] = 0.0

    def steps() -> Iterator[tuple[int, Callable[[], float]]]:
        for ids, targets in batches(recipe, tokenizer):
            scored = int((targets != IGNORED).sum())
            arrays = (torch.from_numpy(ids), torch.from_numpy(targets))
            yield 1, partial(add_gradient, model, *arrays, scored)

    # Where standard error is no terminal, tqdm's None leaves the bar out.
    bar = tqdm(
        desc="training the model for additions (once)",
        total=recipe.steps,
        disable=None if progress else True,
    )
    return model, optimise(model, (matrices, vectors), steps(), recipe, bar)


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

    first = tokens([str(term) for term in TERMS])
    further = tokens([f"+{term}" for term in TERMS])
    sums = tokens([f" {total}" for total in SUMS])
    lowest = SUMS[0]
    (missing, equals, cue, end) = tokens([MISSING, EQUALS, CUE.rstrip(), END])

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
        targets = np.full_like(ids, IGNORED)
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
    most = SUMS[-1] - (totals[:, -1:] - at_slip)
    shift = random.integers(SUMS[0], most + 1) - at_slip
    behind = replaced & (np.arange(MAX_TERMS - 1) >= slip)
    return np.where(behind, totals + shift, totals), slip
