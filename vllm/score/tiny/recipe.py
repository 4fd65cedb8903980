"""What the embedded model is made of, and the key under which it is cached."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.tokenizer import MINIMUM_VOCABULARY

# Raise it when the code changes what a recipe gives: cached models of before are then not used.
_FORMAT = 1


@dataclass(frozen=True)
class Phase:
    """A number of optimiser steps on batches of one shape (sequences x tokens)."""

    sequence_length: int
    sequences: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the text and the libraries.

    The defaults came out of some 300 trainings of equal cost, about a minute on two CPU cores, by
    held-out bits per byte. At that cost the number of steps counts for more than the number of
    parameters. Short sequences first and a third of the time at the full context give the best
    figure at a context of 2,048; trained on 256 tokens alone, the loss would rise beyond them.
    Four heads let the model run under tensor parallelism.

    Attributes:
        vocab_size: of the byte-level BPE.
        hidden_size, intermediate_size, num_layers, head_dim: of the Llama architecture.
        max_position_embeddings: longest sequence the model takes, in tokens.
        phases: batches and steps, in order.
        learning_rate: peak, of every matrix in the layers; linear warm-up, then linear to
            zero, by tokens seen.
        embedding_rate_factor: how much faster the embedding and the head learn.
        warmup_fraction: share of the tokens until the peak, in [0, 1).
        weight_decay: of the matrices.
        init_std: standard deviation of the initial weights.
        held_out_fraction: expected share of the packages kept out of the training.
        minimum_bytes: least amount of text to accept.
        seed: of the initial weights and of the order of the batches.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048
    phases: tuple[Phase, ...] = (Phase(128, 8, 440), Phase(512, 2, 240), Phase(2048, 2, 42))
    learning_rate: float = 4e-3
    embedding_rate_factor: float = 2.0
    warmup_fraction: float = 0.1
    weight_decay: float = 0.1
    init_std: float = 0.05
    held_out_fraction: float = 0.08
    minimum_bytes: int = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < MINIMUM_VOCABULARY:
            raise ScoreModeError(
                f"vocab_size is {self.vocab_size}; it must be at least {MINIMUM_VOCABULARY}"
            )
        if self.hidden_size % self.head_dim:
            raise ScoreModeError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of head_dim, "
                f"{self.head_dim}"
            )
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ScoreModeError(
                f"warmup_fraction is {self.warmup_fraction}; it must be at least 0 and below 1"
            )
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
    def steps(self) -> int:
        """Optimiser steps in all."""
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Tokens seen in training, repetitions counted."""
        return sum(phase.sequence_length * phase.sequences * phase.steps for phase in self.phases)

    def key(self) -> str:
        """16 hex digits that change with the recipe, with this code and with the Python release.

        The release stands for the text: hashing the text itself would take seconds a start.
        """
        content = {"format": _FORMAT, "python": platform.python_version(), "recipe": asdict(self)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
