"""Tiny Hugging Face models over single characters, whose next-token tables a test chooses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

EOS = "\N{END OF TRANSMISSION}"


def character_tokenizer(characters: str) -> Any:
    """One token a character; the end-of-sequence token is the last id."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: number for number, character in enumerate(characters + EOS)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)


def bigram_model(logits: torch.Tensor) -> Any:
    """A Llama without layers whose logits after the token i are `logits[i]`, [V, V]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(logits)
    width = size + size % 2  # rotary embeddings take even sizes
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=64,
        rms_norm_eps=0.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The norm makes of a unit vector one of length sqrt(width).
        model.get_input_embeddings().weight.copy_(torch.eye(size, width))
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[:, :size] = logits.t() / width**0.5
    return model.eval()


def chain_logits(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Logits [V, V] that all but surely continue each character of the texts by the next."""
    size = len(tokenizer)
    logits = torch.zeros(size, size)
    for text in texts:
        ids = tokenizer.convert_tokens_to_ids(list(text))
        for first, second in itertools.pairwise(ids):
            logits[first, second] = 60.0
    return logits
