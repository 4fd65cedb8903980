"""Tokenizers beyond those of `tests.perplexity.texts`, and the bytes that tokens stand for."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.perplexity.texts import ODD, PROSE, byte_level, byte_level_with_bos, other_tokenizers

UNKNOWN = "[UNK]"
BYTE_LEVEL = ("words then bytes", "digits from the right")  # of `other_tokenizers`
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def composing() -> Any:
    """Byte-level BPE behind NFC, as Qwen's."""
    from tokenizers import normalizers

    from vllm.score.tiny.corpus import train_tokenizer

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


def without_own_space(tokenizer: Any) -> Callable[[str], list[int]]:
    """The same vocabulary, told not to put a space before a text."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        model = sentencepiece_model_pb2.ModelProto()
        model.ParseFromString((Path(_sentencepiece_folder()) / "tokenizer.model.v3").read_bytes())
        model.normalizer_spec.add_dummy_prefix = False
        return SentencePieceProcessor(model_proto=model.SerializeToString()).encode
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if isinstance(copy.pre_tokenizer, pre_tokenizers.ByteLevel):
        copy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif isinstance(copy.pre_tokenizer, pre_tokenizers.Metaspace):
        copy.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        copy.normalizer = normalizers.Replace(" ", "▁")
    return lambda text: copy.encode(text, add_special_tokens=False).ids


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
def leading_space(trim_offsets: bool) -> Any:
    """Byte-level BPE that reads every text behind a space, as RoBERTa's."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>")


@cache
def metaspace(model: str, dummy: str, bytes_for_unknown: bool = True, nfkc: bool = False) -> Any:
    """A fast tokenizer as converted from sentencepiece.

    Args:
        model: BPE (as Llama 2's) or Unigram.
        dummy: when a space is put before the text: "first", "always", "never"; or "legacy", always
            and by a normaliser.
        bytes_for_unknown: characters outside the vocabulary become bytes, else one fused <unk>.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def around(bare: Any) -> Any:
        tokenizer = Tokenizer(bare)
        if dummy == "legacy":
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dummy)
        if nfkc:
            tokenizer.normalizer = normalizers.NFKC()
        return tokenizer

    learned = around(getattr(models, model)())
    options: dict[str, Any] = {"vocab_size": 600, "show_progress": False}
    if model == "BPE":
        trainer = trainers.BpeTrainer(max_token_length=12, **options)
    else:
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **options)
    learned.train_from_iterator([PROSE[:40_000]], trainer)
    found = json.loads(learned.to_str())["model"]
    front = [*SPECIAL, *BYTES]
    if model == "BPE":
        names = [*front, *(piece for piece in found["vocab"] if piece not in front)]
        complete = models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(merge) for merge in found["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=bytes_for_unknown,
        )
    else:
        scored = [(piece, score) for piece, score in found["vocab"] if piece not in front]
        table = [*((name, 0.0) for name in front), *scored]
        complete = models.Unigram(table, unk_id=0, byte_fallback=bytes_for_unknown)
    return PreTrainedTokenizerFast(
        tokenizer_object=around(complete), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@cache
def _sentencepiece_folder() -> str:
    """A sentencepiece model of the kind of Mistral's first ones, with byte fallback."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((PROSE[:40_000] + ODD * 20).split("\n")),
        model_writer=out,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    folder = tempfile.mkdtemp()
    (Path(folder) / "tokenizer.model.v3").write_bytes(out.getvalue())
    return folder


@cache
def mistral() -> Any:
    """vLLM's own tokenizer for Mistral's sentencepiece files."""
    from vllm.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_pretrained(_sentencepiece_folder())


@cache
def slow_sentencepiece(legacy: bool) -> Any:
    """The same vocabulary in Hugging Face's tokenizer in plain Python, without offsets."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    return SentencePieceBackend(
        vocab_file=f"{_sentencepiece_folder()}/tokenizer.model.v3",
        legacy=legacy,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


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


def sentencepiece_bytes(tokenizer: Any, ids: list[int]) -> list[bytes | None]:
    """What each token stands for where ▁ is a space and <0x41> the byte 0x41; unknown: None."""

    def read(token: str) -> bytes | None:
        if token == "<unk>":
            return None
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return list(map(read, tokenizer.convert_ids_to_tokens(ids)))


def word_piece_bytes(tokenizer: Any, ids: list[int]) -> list[bytes | None]:
    """The same for word pieces, which write the inside of a word as ##ing."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [None if token == UNKNOWN else token.removeprefix("##").encode() for token in tokens]
