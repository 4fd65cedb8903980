"""Byte-level BPE tokenizers trained on the spot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vllm.score.checks import Whole, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
MINIMUM_VOCABULARY = 256 + 2  # every byte, BOS and EOS


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text is encoded without loss.

    The tokenizer adds no BOS by itself, as GPT-2's does: whether a BOS is scored or only given as
    context is then said by the caller, and the tokens of a text are the same everywhere.
    BOS has id 0, EOS id 1. The result is smaller than `vocab_size` where the texts are too short
    for that many merges (none at all leaves the bytes and the two special tokens).

    Args:
        texts: the training text; its order does not matter.
        vocab_size: size of the vocabulary, special tokens included.

    Raises:
        ScoreModeError: for a `vocab_size` that cannot hold the 256 bytes and the special tokens.
    """
    check(
        "vocab_size",
        vocab_size,
        Annotated[Whole, Field(ge=MINIMUM_VOCABULARY)],
        "a byte-level tokenizer has 256 bytes, BOS and EOS",
    )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        clean_up_tokenization_spaces=False,
    )
