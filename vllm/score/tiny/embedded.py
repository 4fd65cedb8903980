"""The embedded default: a small model trained on this machine, made once and kept in the cache."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field

from vllm.score.checks import Count, Number, Whole, settings
from vllm.score.errors import ScoreModeError
from vllm.score.tiny.corpus import (
    MINIMUM_VOCABULARY,
    standard_library_corpus,
    text_bytes,
    train_tokenizer,
)
from vllm.score.tiny.training import (
    MODEL,
    LlamaRecipe,
    Made,
    check_heads,
    make_once,
    new_llama,
    one_openmp_thread,
    optimise,
)
from vllm.score.tokens import read_token_ids

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

_HELD_OUT, _COUNTS = "held_out.txt", "train_counts.npy"


@dataclass(frozen=True)
class Phase:
    """A number of optimiser steps on batches of one shape (sequences x tokens)."""

    sequence_length: int
    sequences: int
    steps: int


@settings
class Recipe(LlamaRecipe):
    """Everything that decides the weights, besides the text and the libraries.

    The defaults came out of some 300 trainings of equal cost, about a minute on two CPU cores, by
    held-out bits per byte. At that cost the number of steps counts for more than the number of
    parameters. Short sequences first and a third of the time at the full context give the best
    figure at a context of 2,048; trained on 256 tokens alone, the loss would rise beyond them.
    Four heads let the model run under tensor parallelism.

    Attributes:
        vocab_size: of the byte-level BPE.
        max_position_embeddings: longest sequence the model takes, in tokens.
        phases: batches and steps, in order. The rate falls with the tokens seen, not with the
            steps: the long sequences at the end come in few, large steps, and would else be seen
            when hardly anything is learned any more.
        embedding_rate_factor: how much faster the embedding and the head learn than the matrices
            in the layers.
        held_out_fraction: expected share of the packages kept out of the training.
        minimum_bytes: least amount of text to accept.
    """

    kind = "embedded"
    name = "the embedded model"
    begins = (
        "Making the embedded model from the docstrings of Python's standard library "
        "(once; about a minute on 2 cores)"
    )
    files = (_HELD_OUT, _COUNTS)

    vocab_size: Annotated[Whole, Field(ge=MINIMUM_VOCABULARY)] = 2048
    hidden_size: Count = 128
    intermediate_size: Count = 352
    num_layers: Count = 2
    max_position_embeddings: Count = 2048
    phases: tuple[Phase, ...] = (Phase(128, 8, 440), Phase(512, 2, 240), Phase(2048, 2, 42))
    learning_rate: Number = 4e-3
    embedding_rate_factor: Number = 2.0
    weight_decay: Number = 0.1
    held_out_fraction: Number = 0.08
    minimum_bytes: Whole = 200_000

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.head_dim)
        if not self.phases:
            raise ScoreModeError("phases is empty; at least one phase of training is needed")
        for phase in self.phases:
            if min(phase.sequence_length, phase.sequences, phase.steps) < 1:
                raise ScoreModeError(f"phases holds {phase}; its numbers must be 1 or more")
            if phase.sequence_length > self.max_position_embeddings:
                raise ScoreModeError(
                    f"phases holds {phase}; its sequence_length must be at most "
                    f"max_position_embeddings, {self.max_position_embeddings}"
                )

    @property
    def tokens(self) -> int:
        """Tokens seen in training, repetitions counted."""
        return sum(phase.sequence_length * phase.sequences * phase.steps for phase in self.phases)

    def key(self, **content: Any) -> str:
        """16 hex digits that change with the recipe, with this code and with the Python release.

        The release stands for the text: hashing the text itself would take seconds a start.
        """
        return super().key(python=platform.python_version(), **content)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model made on this machine.

    Attributes:
        directory: the model and its tokenizer, as Hugging Face and vLLM load them; float32, in
            which it was trained: at this size the file is small, and scores can be compared
            with a float64 reference without the rounding of bf16 weights in between.
        held_out_text: UTF-8 file of text that training never saw.
        train_counts: int64 [V], how often each token occurs in the training text.
        facts: how it was made and what came out, as in `facts.json`.
    """

    directory: Path
    held_out_text: Path
    train_counts: np.ndarray
    facts: Mapping[str, Any]

    def uniform_perplexity(self) -> float:
        """Perplexity of a uniform guess over the vocabulary."""
        return float(len(self.train_counts))

    def unigram_perplexity(self, token_ids: Sequence[int] | np.ndarray) -> float:
        """Perplexity of the tokens under their frequencies in the training text.

        See `vllm.score.tiny.embedded.unigram_perplexity` for the formula and the errors.
        """
        return unigram_perplexity(token_ids, self.train_counts)


def embedded_model(
    cache_dir: Path | None = None, progress: bool = True, *, recipe: Recipe | None = None
) -> EmbeddedModel:
    """The embedded model; made on the first call (about a minute on 2 cores), then read.

    In the cache it is there whole or not at all, whoever else makes it; see `make_once`.
    A changed recipe, or another Python release (other text), makes another model.

    Args:
        cache_dir: by default what the environment variable VLLM_SCORE_CACHE names, else the
            user's cache directory (on Linux XDG_CACHE_HOME, or ~/.cache).
        progress: whether to say on standard error that the model is being made, with a bar.
        recipe: another recipe than the default, e.g. for tests.

    Raises:
        ScoreModeError: where the cache cannot be written, or this Python lacks the sources of
            its standard library.
    """
    recipe = recipe or Recipe()
    build = partial(_build, recipe=recipe, progress=progress)
    folder, facts = make_once(recipe, build, cache_dir, progress)
    counts = np.load(folder / _COUNTS)
    return EmbeddedModel(folder / MODEL, folder / _HELD_OUT, counts, facts)


def _build(folder: Path, recipe: Recipe, progress: bool) -> Made:
    corpus = standard_library_corpus(
        held_out_fraction=recipe.held_out_fraction, minimum_bytes=recipe.minimum_bytes
    )
    tokenizer = train_tokenizer([d.text for d in corpus.train], recipe.vocab_size)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream: list[int] = []
    for document in corpus.train:
        stream += [bos, *tokenizer.encode(document.text), eos]
    train_ids = np.array(stream, dtype=np.int64)
    counts = np.bincount(train_ids, minlength=recipe.vocab_size)

    model, loss = train(train_ids, recipe, bos=bos, eos=eos, progress=progress)

    held_out = "\n".join(document.text for document in corpus.held_out)
    held_out_ids = np.array(tokenizer.encode(held_out), dtype=np.int64)
    window = recipe.max_position_embeddings
    nats, scored = held_out_nats(model, held_out_ids, window)
    (folder / _HELD_OUT).write_bytes(held_out.encode())
    np.save(folder / _COUNTS, counts)
    facts = {
        "training_text": {
            "source": "docstrings of Python's standard library",
            "bytes": text_bytes(corpus.train),
            "files": len(corpus.train),
            "tokens": len(train_ids),
            "corpus_sha256": corpus.sha256(),
            "held_out_packages": sorted({document.package for document in corpus.held_out}),
        },
        "training_steps": sum(phase.steps for phase in recipe.phases),
        "training_tokens_seen": recipe.tokens,
        "training_loss_nats": loss,
        "held_out_bytes": len(held_out.encode()),
        "held_out_tokens": len(held_out_ids),
        "held_out_window": window,
        "held_out_perplexity": math.exp(nats / scored),
        "held_out_unigram_perplexity": unigram_perplexity(held_out_ids[1:], counts),
    }
    return Made(model, tokenizer, facts)


# --- training


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
        The model in evaluation mode, and its mean loss in nats per token over the last tenth of
        the steps.

    Raises:
        ScoreModeError: where the text is too short for a sequence of the recipe, or the loss is
            no longer a number.
    """
    model = new_llama(
        recipe,
        recipe.hidden_size // recipe.head_dim,
        vocab_size=recipe.vocab_size,
        max_position_embeddings=recipe.max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    for name, weight in model.named_parameters():
        # What the layers add to the residual stream starts small, as in GPT-2.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(1 / math.sqrt(2 * recipe.num_layers))
    batches = ((ids[:, 1:].size, ids, ids) for ids in _batches(token_ids, recipe))
    more: dict[str, Any] = {"replicas": 2, "unit": "tok", "unit_scale": True}
    more["embedding_rate_factor"] = recipe.embedding_rate_factor
    return model, optimise(model, batches, recipe, recipe.tokens, progress, **more)


def _batches(token_ids: np.ndarray, recipe: Recipe) -> Iterator[np.ndarray]:
    """Batches [sequences, length + 1]; the last token of each row is only a target."""
    order = np.random.default_rng(recipe.seed)
    for phase in recipe.phases:
        starts = _starts(len(token_ids), phase, order)
        for _ in range(phase.steps):
            rows = [next(starts) for _ in range(phase.sequences)]
            yield np.stack([token_ids[s : s + phase.sequence_length + 1] for s in rows])


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


# --- figures to read the model's against


def held_out_nats(model: LlamaForCausalLM, token_ids: np.ndarray, window: int) -> tuple[float, int]:
    """Negative log-likelihood of a stream in windows that do not overlap.

    Args:
        token_ids: int64 [n].
        window: tokens in a window; the first token of each window is context alone.

    Returns:
        Sum in nats (accumulated in float64) and number of scored tokens.
    """
    total, count = 0.0, 0
    for ids in torch.from_numpy(token_ids).split(window):
        with torch.no_grad(), one_openmp_thread():
            logits = model(ids[None], use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum")
        total += loss.item()
        count += len(ids) - 1
    return total, count


def unigram_perplexity(token_ids: Sequence[int] | np.ndarray, counts: np.ndarray) -> float:
    """Perplexity of tokens when each is predicted from its frequency elsewhere, without context.

    With c_t the count of token t in the training text, N the sum of the counts and V their
    number, p(t) = (c_t + 1) / (N + V) (add-one smoothing, so no token is impossible), and the
    result is exp(-mean over the given tokens of ln p).

    Args:
        token_ids: int [n], the tokens to predict. A model without BOS cannot predict the first
            token of a text: leave it out here too when the two are compared.
        counts: int [V], of the training text.

    Raises:
        ScoreModeError: for no tokens, ids that are no integers or lie outside [0, V), or counts
            that are not whole numbers of 0 or more.
    """
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.size == 0 or counts.min() < 0:
        raise ScoreModeError(
            f"counts has shape {counts.shape} and dtype {counts.dtype}; it must be a vector of "
            "whole numbers of 0 or more, one for each entry of the vocabulary"
        )
    ids = read_token_ids(token_ids, len(counts), "token_ids")
    if len(ids) == 0:
        raise ScoreModeError("token_ids is empty; a perplexity needs at least one token")
    log_probabilities = np.log(counts + 1.0) - math.log(float(counts.sum()) + len(counts))
    return math.exp(-float(np.mean(log_probabilities[ids])))
