"""A task that a very small model can learn: adding up numbers with running sums as reasoning.

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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from vllm.score.checks import Whole, check
from vllm.score.errors import ScoreModeError
from vllm.score.tiny.tokenizer import BOS_TOKEN, EOS_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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
        if not (
            MIN_TERMS <= len(self.terms) <= MAX_TERMS and all(term in TERMS for term in self.terms)
        ):
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
