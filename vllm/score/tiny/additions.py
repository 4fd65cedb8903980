"""A task that a very small model can learn: adding up numbers with running sums as reasoning;
and the model that has learned it, made once and kept in the user's cache.

A question has two to eight terms from 1 to 9, in eight places of which the missing ones are dots;
its reasoning is the running sums; the answer follows the cue. All of one text:

    7+4+9+3....= 11 20 23

    The answer is: 23

What matters for deciding how long to reason: the reasoning can stop after any sum, and every sum
that is written down leaves fewer terms to guess the answer from, so the uncertainty shrinks
gradually, from that of a blurred total to none. Each sum is one token, and an answer is one token
and its end, so that what one more token of reasoning tells can be computed exactly, by going
through the vocabulary of less than 100 tokens.

The dots keep the j-th sum always at the same distance from the j-th term. Without them a model
this small takes many times as long to find the next term.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from vllm.score.checks import Count, Number, Whole, check, settings
from vllm.score.errors import ScoreModeError
from vllm.score.tiny.corpus import BOS_TOKEN, EOS_TOKEN
from vllm.score.tiny.training import (
    IGNORED,
    MODEL,
    LlamaRecipe,
    Made,
    make_once,
    new_llama,
    optimise,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MIN_TERMS, MAX_TERMS = 2, 8
MIN_TERM, MAX_TERM = 1, 9
# Behind the reasoning, before the answer, and behind it. The blank belongs to the answer's token.
CUE = "\n\nThe answer is: "
END = "\n"

PAD_TOKEN, UNKNOWN_TOKEN = "<|pad|>", "<|unk|>"
MISSING, EQUALS = ".", "="
TERMS = range(MIN_TERM, MAX_TERM + 1)
SUMS = range(MIN_TERMS * MIN_TERM, MAX_TERMS * MAX_TERM + 1)


@dataclass(frozen=True)
class Problem:
    """One addition.

    Attributes:
        terms: from 2 to 8 numbers from 1 to 9.

    Raises:
        ScoreModeError: for other terms.
    """

    terms: tuple[int, ...]

    def __post_init__(self) -> None:
        if not (MIN_TERMS <= len(self.terms) <= MAX_TERMS and set(self.terms) <= set(TERMS)):
            raise ScoreModeError(
                f"terms is {self.terms}; it must hold {MIN_TERMS} to {MAX_TERMS} whole numbers "
                f"from {MIN_TERM} to {MAX_TERM}"
            )

    @property
    def sums(self) -> tuple[int, ...]:
        """The running sums, one fewer than terms: the first is that of two terms."""
        return tuple(itertools.accumulate(self.terms))[1:]

    @property
    def question(self) -> str:
        """Such as "7+4+9+3....="."""
        missing = MISSING * (MAX_TERMS - len(self.terms))
        return "+".join(map(str, self.terms)) + missing + EQUALS

    @property
    def scratchpad(self) -> str:
        """The reasoning, such as " 11 20 23"; any number of sums may be cut off its end."""
        return "".join(f" {total}" for total in self.sums)

    @property
    def answer(self) -> str:
        """Such as "23"; in a text it stands between CUE and END."""
        return str(self.sums[-1])


def random_problems(
    count: int, *, seed: int, min_terms: int = MIN_TERMS, max_terms: int = MAX_TERMS
) -> list[Problem]:
    """Problems with independent terms, and the number of terms as random, all uniform.

    Training draws from the same distribution. Of problems with few terms all are seen there (there
    are 81 with two); of 43 million with eight, hardly one.

    Raises:
        ScoreModeError: for a negative count, or numbers of terms that are not in order from 2 to 8.
    """
    check("count", count, Annotated[Whole, Field(ge=0)])
    if not MIN_TERMS <= min_terms <= max_terms <= MAX_TERMS:
        raise ScoreModeError(
            f"min_terms is {min_terms} and max_terms {max_terms}; they must be in order, from "
            f"{MIN_TERMS} to {MAX_TERMS}"
        )
    random = np.random.default_rng(seed)
    lengths = random.integers(min_terms, max_terms + 1, count)
    terms = random.integers(MIN_TERM, MAX_TERM + 1, (count, MAX_TERMS))
    return [
        Problem(tuple(row[:length])) for row, length in zip(terms.tolist(), lengths, strict=True)
    ]


def write_questions(path: Path, problems: Iterable[Problem]) -> None:
    """Write JSON lines with "question" and "answer"."""
    rows = ({"question": problem.question, "answer": problem.answer} for problem in problems)
    Path(path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def tokenizer() -> PreTrainedTokenizerFast:
    """The task's tokenizer: a term, a dot, a sum with its blank, the cue are one token each.

    It adds no special tokens by itself, encodes texts of the task without loss, and takes what is
    foreign to the task for the unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cue = CUE.rstrip()
    words = [
        *(BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN),
        *(cue, END, EQUALS, MISSING),
        *map(str, TERMS),
        *(f"+{term}" for term in TERMS),
        *(f" {total}" for total in SUMS),
    ]
    vocabulary = {word: token for token, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    made.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"{cue}|{END}|\+[0-9]| ?[0-9]+|[{EQUALS}{MISSING}]"), behavior="isolated"
    )
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        clean_up_tokenization_spaces=False,
    )


# --- the model

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

    kind = "additions"
    name = "the model for additions"
    begins = "Making the model for additions (once; under a minute on one core)"

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
    """A model made on this machine, for this task.

    Attributes:
        directory: the model and its tokenizer, as Hugging Face and vLLM load them, in float32.
        facts: how it was made and what came out, as in `facts.json`.
    """

    directory: Path
    facts: Mapping[str, Any]


def additions_model(
    cache_dir: Path | None = None, progress: bool = True, *, recipe: AdditionsRecipe | None = None
) -> AdditionsModel:
    """The model for additions; made on the first call (under a minute on one core), then read.

    In the cache it is there whole or not at all, whoever else makes it; see `make_once`.
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

    def build(_: Path) -> Made:
        words = tokenizer()
        model, loss = train(recipe, words, progress=progress)
        facts = {
            "training_steps": recipe.steps,
            "training_texts": recipe.steps * recipe.sequences,
            "training_loss_nats": loss,
        }
        return Made(model, words, facts)

    folder, facts = make_once(recipe, build, cache_dir, progress)
    return AdditionsModel(folder / MODEL, facts)


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
    steps = ((1, *texts) for texts in batches(recipe, tokenizer))
    return model, optimise(model, steps, recipe, recipe.steps, progress)


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
