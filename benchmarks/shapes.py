"""The model shapes that are benchmarked, as the fields of their config.json."""

from __future__ import annotations

import argparse
import atexit
import json
import shutil
import tempfile
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
    },
    # What two CPU cores can be measured with.
    "llama-60m": {
        **_LLAMA,
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_768,
        "max_position_embeddings": 4096,
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
    },
}


def add_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that choose a shape."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default=default)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--vocab-size", type=int, help="another vocabulary than the shape's")


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The config.json that the options describe."""
    config = dict(SHAPES[options.shape])
    if options.layers:
        config["num_hidden_layers"] = options.layers
    if options.vocab_size:
        config["vocab_size"] = options.vocab_size
    return config


def is_whole(options: argparse.Namespace) -> bool:
    """Whether it is the shape itself, which targets speak of, not a part of it."""
    return not options.layers and not options.vocab_size


def folder_of(config: dict[str, Any]) -> str:
    """A folder with this config.json and a tokenizer, removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="score-benchmark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)
    _tokenizer(config["vocab_size"]).save_pretrained(folder)
    return folder


def _tokenizer(vocab_size: int) -> Any:
    """A byte-level tokenizer of that many tokens, words of random letters: stock vLLM decodes every
    token that it gives a log-probability, as it does for its users.
    """
    import random

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    generator = random.Random(0)
    vocabulary = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    while len(vocabulary) < vocab_size:
        letters = generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))
        vocabulary[generator.choice(("", "\u0120")) + "".join(letters)] = None
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
