"""Tokenizers beyond those of `tests.perplexity.texts`, and the bytes that tokens stand for."""

from __future__ import annotations

from functools import cache
from typing import Any

from tests.perplexity.texts import ODD, PROSE, byte_level, byte_level_with_bos, other_tokenizers

UNKNOWN = "[UNK]"
BYTE_LEVEL = ("words then bytes", "digits from the right")  # of `other_tokenizers`


@cache
def composing() -> Any:
    """Byte-level BPE behind NFC, as Qwen's."""
    from tokenizers import normalizers

    from vllm.score.tiny.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([PROSE[:40_000], ODD * 20], 700)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@cache
def bert_like() -> Any:
    """Word pieces between [CLS] and [SEP]; no BOS, no EOS."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = [UNKNOWN, "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([PROSE[:40_000], ODD * 20], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=UNKNOWN)


@cache
def with_start(name: str) -> Any:
    """One of `other_tokenizers`, with a token to put before a text, and a decoder."""
    from tokenizers import Tokenizer, decoders
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(other_tokenizers()[name].backend_tokenizer.to_str())
    if name in BYTE_LEVEL:
        backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<unk>")


@cache
def slow() -> Any:
    """A tokenizer in plain Python, without offsets: bytes, and an EOS behind every text."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


class WithoutOffsets:
    """Any tokenizer behind the few methods that every tokenizer of vLLM has."""

    is_fast = True  # vLLM's own tokenizer for Mistral's files says so, too

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
            setattr(self, name, getattr(tokenizer, name))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.inner.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def lossless() -> dict[str, Any]:
    """Byte-level tokenizers that take any text as it is."""
    return {
        "bytes": byte_level(),
        "bytes, BOS": byte_level_with_bos(),
        "trimmed offsets": with_start("words then bytes"),
        "digits from the right": with_start("digits from the right"),
    }


@cache
def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in kept}
    table |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*kept}))}
    return table


def token_bytes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """What each token of a byte-level tokenizer stands for."""
    table = _bytes_of_characters()
    return [bytes(table[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids)]
