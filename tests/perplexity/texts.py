"""Texts and tokenizers that the tests of this folder share."""

from __future__ import annotations

import inspect
import textwrap
from functools import cache
from typing import Any

from hypothesis import strategies as st

import vllm.score.tiny.corpus as tiny

UNKNOWN = "<unk>"
ODD = "é漢字😀 the \u0301 aaaa ==== 1234567 \r\n\t e\u0301 ﬁ"
PROSE = "\n\n".join(
    inspect.getsource(module) for module in (textwrap, inspect) if module is not None
)

# Every kind of character that a tokenizer treats in its own way, in runs and mixed.
PIECES = ["a", "b", " ", "  ", "\n", "é", "漢字", "😀", "the", "\t", "1", "23", "aaaa", "ing"]
PIECES += ["=====", "\u0301", "\r\n", "e\u0301", "ﬁ", "."]


def odd_texts(max_pieces: int = 1500) -> st.SearchStrategy[str]:
    """Texts over a random few of `PIECES`, long enough for several blocks."""

    def joined(alphabet: list[str], seed: int, length: int) -> str:
        import random

        return "".join(random.Random(seed).choices(alphabet, k=length))

    return st.builds(
        joined,
        st.lists(st.sampled_from(PIECES), min_size=1, max_size=len(PIECES), unique=True),
        st.integers(0, 1 << 30),
        st.integers(0, max_pieces),
    )


@cache
def byte_level() -> Any:
    """Byte-level BPE, as GPT-2's; adds no BOS."""
    return tiny.train_tokenizer([PROSE[:60_000], ODD * 20], 700)


@cache
def byte_level_with_bos() -> Any:
    """The same, but tokenizer(text) begins with a BOS, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.train_tokenizer([PROSE[:60_000], ODD * 20], 700)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@cache
def other_tokenizers() -> dict[str, Any]:
    """One tokenizer of each family in use."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

    words = pre_tokenizers.Split(
        Regex(
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        "isolated",
    )
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    common = {"special_tokens": [UNKNOWN], "show_progress": False}
    return {
        "words then bytes": _train(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **common),
            pre_tokenizer=pre_tokenizers.Sequence([words, as_bytes]),
            post_processor=processors.ByteLevel(trim_offsets=True),
        ),
        "digits from the right": _train(
            models.BPE(),
            trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, **common),
            pre_tokenizer=pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)]),
        ),
        "no pre-tokenizer, leading space": _train(
            models.BPE(unk_token=UNKNOWN, fuse_unk=True),
            trainers.BpeTrainer(vocab_size=700, max_token_length=16, **common),
            normalizer=normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            ),
        ),
        "unigram, NFKC": _train(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=500, unk_token=UNKNOWN, **common),
            pre_tokenizer=pre_tokenizers.Metaspace(),
            normalizer=normalizers.NFKC(),
        ),
        "unigram over spaces": _train(
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=500, unk_token=UNKNOWN, **common),
        ),
        "word pieces": _train(
            models.WordPiece(unk_token=UNKNOWN),
            trainers.WordPieceTrainer(vocab_size=700, **common),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
            normalizer=normalizers.BertNormalizer(),
        ),
    }


def _train(model: Any, trainer: Any, **parts: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    after = parts.pop("post_processor", None)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([PROSE[:40_000], ODD * 20], trainer)
    if after is not None:
        tokenizer.post_processor = after
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)
