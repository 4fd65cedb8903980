"""Small models with random weights, in the file format of real ones, for tests and benchmarks.

The weights are drawn so that a wrong score shows. Each linear map keeps the size of its input, so
attention and MLP both matter; norm weights and biases are no ones and zeros; the logits have a
standard deviation of a few nats, so the distributions are neither flat nor a single spike.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.tiny.saving import save_model
from vllm.score.tiny.tokenizer import MINIMUM_VOCABULARY, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen3", "gpt2", "opt", "gemma2")
DTYPES = ("float32", "bfloat16", "float16")
_TIED_BY_DEFAULT = {"llama": False, "qwen3": False, "gpt2": True, "opt": True, "gemma2": True}
_NORM_JITTER = 0.1
_BIAS_STD = 0.1


def make_random_model(
    directory: str | Path,
    architecture: str,
    *,
    vocab_size: int | None = None,
    hidden_size: int = 128,
    num_layers: int = 2,
    head_dim: int = 32,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 2048,
    logit_std: float = 3.0,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    tie_word_embeddings: bool | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model of random weights, with its configuration and tokenizer, to a folder.

    The same arguments give the same bytes.

    Args:
        directory: folder to write to; made where it does not exist.
        architecture: one of `ARCHITECTURES`.
        vocab_size: rows of the embedding; by default the tokenizer's size, or 1024.
        hidden_size: a multiple of `head_dim`.
        num_layers: number of decoder layers.
        head_dim: size of an attention head; vLLM's CPU attention takes 32, 64, 80, 96, 112, 128
            and more, but not 16.
        intermediate_size: width of the MLP; by default 4 times `hidden_size`, and for gated MLPs
            (llama, qwen3, gemma2) 3 times.
        max_position_embeddings: longest sequence, in tokens.
        logit_std: standard deviation of a logit over the vocabulary, in nats, before any soft cap
            (of tied models' logits: apart from that of the input token itself).
        seed: of the weights.
        dtype: of the stored weights: float32, bfloat16 or float16.
        tie_word_embeddings: whether the head is the input embedding; by default as the
            architecture's best-known models have it (llama and qwen3 untied, the others tied).
        tokenizer: saved beside the model; by default a byte-level BPE of at most `vocab_size`
            entries, trained on a few docstrings of the standard library.
        config_overrides: further fields of the Hugging Face configuration, by their own names.

    Returns:
        The folder, as a path.

    Raises:
        ScoreModeError: for an argument that names no model this function can make, or none that
            vLLM can run.
    """
    _check_choice("architecture", architecture, ARCHITECTURES)
    dtype_name = str(dtype).removeprefix("torch.")
    _check_choice("dtype", dtype_name, DTYPES)
    if vocab_size is None:
        vocab_size = 1024 if tokenizer is None else len(tokenizer)
    tied = _TIED_BY_DEFAULT[architecture] if tie_word_embeddings is None else tie_word_embeddings
    if architecture == "gemma2" and not tied:
        raise ScoreModeError(
            "tie_word_embeddings=False with architecture='gemma2': vLLM's Gemma-2 always computes "
            "its logits with the input embedding; leave it out, or choose another architecture"
        )
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "intermediate_size": intermediate_size or (3 if _gated(architecture) else 4) * hidden_size,
    }
    _check_sizes(sizes, intermediate_size, logit_std, seed)
    if tokenizer is None:
        tokenizer = _default_tokenizer(vocab_size)
    elif len(tokenizer) > vocab_size:
        raise ScoreModeError(
            f"vocab_size is {vocab_size}, but the tokenizer has {len(tokenizer)} entries; "
            "raise vocab_size or leave it out"
        )

    import torch
    from transformers import AutoModelForCausalLM

    config = _configuration(architecture, sizes, tied, tokenizer, config_overrides or {})
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, architecture, logit_std=logit_std, seed=seed)
    model.to(getattr(torch, dtype_name))
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, path)
    return path


def _configuration(
    architecture: str,
    sizes: Mapping[str, int],
    tied: bool,
    tokenizer: PreTrainedTokenizerFast,
    overrides: Mapping[str, Any],
) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    heads = sizes["hidden_size"] // sizes["head_dim"]
    fields: dict[str, Any] = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": heads,
        "max_position_embeddings": sizes["max_position_embeddings"],
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    if _gated(architecture):
        fields |= {
            "intermediate_size": sizes["intermediate_size"],
            "head_dim": sizes["head_dim"],
            # Grouped-query attention where the number of heads allows it: the usual case today.
            "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        }
        if architecture == "gemma2":
            fields["query_pre_attn_scalar"] = sizes["head_dim"]
    elif architecture == "gpt2":
        fields |= {"n_inner": sizes["intermediate_size"]}
        fields |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        fields |= {"ffn_dim": sizes["intermediate_size"], "dropout": 0.0}
    known = AutoConfig.for_model(architecture)
    for name in overrides:
        if not hasattr(known, name):
            raise ScoreModeError(
                f"config_overrides names {name!r}, which {type(known).__name__} does not have"
            )
    try:
        return AutoConfig.for_model(architecture, **(fields | dict(overrides)))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ScoreModeError(f"no {architecture} configuration: {error}") from error


def _draw_weights(
    model: PreTrainedModel, architecture: str, *, logit_std: float, seed: int
) -> None:
    """Fill every parameter, each from a generator of its own: their order does not matter."""
    import torch

    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        # PyTorch's generator on the CPU takes 32 bits of a seed and drops the rest.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            if weight is head:
                # The hidden state that the head sees is normed: its entries are of size 1.
                weight.copy_(noise * (logit_std / math.sqrt(weight.shape[1])))
            elif weight is embedding:
                weight.copy_(noise)
            elif weight.dim() == 1 and name.endswith("bias"):
                weight.copy_(noise * _BIAS_STD)
            elif weight.dim() == 1:
                weight.copy_(noise * _NORM_JITTER + _norm_centre(architecture, name))
            elif "wpe" in name or "embed_positions" in name:
                weight.copy_(noise * 0.5)
            else:
                fan_in = weight.shape[0] if architecture == "gpt2" else weight.shape[1]
                weight.copy_(noise / math.sqrt(fan_in))


def _norm_centre(architecture: str, name: str) -> float:
    if architecture != "gemma2":
        return 1.0
    # Gemma's norms multiply by 1 + weight. Its embedding enters times sqrt(hidden_size) and is
    # also its head: what the layers add must outweigh it, or every token predicts itself.
    after_layer = "post_attention" in name or "post_feedforward" in name
    return 3.0 if after_layer else 0.0


def _default_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A BPE from one folder of the standard library: quick to read, and enough for a test."""
    import email

    from vllm.score.tiny.corpus import read_documents

    if vocab_size < MINIMUM_VOCABULARY:
        return train_tokenizer([], vocab_size)  # says what is wrong
    documents = read_documents(Path(email.__file__).parent)
    return train_tokenizer([document.text for document in documents], vocab_size)


def _gated(architecture: str) -> bool:
    return architecture in ("llama", "qwen3", "gemma2")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ScoreModeError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")


def _check_sizes(
    sizes: Mapping[str, int], intermediate: int | None, logit_std: float, seed: int
) -> None:
    given = dict(sizes) if intermediate is None else {**sizes, "intermediate_size": intermediate}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScoreModeError(f"{name} is {value!r}; it must be a whole number above 0")
    if sizes["head_dim"] < 32 or sizes["head_dim"] % 2:
        raise ScoreModeError(
            f"head_dim is {sizes['head_dim']}; it must be even and at least 32, the smallest head "
            "that vLLM's CPU attention takes"
        )
    if sizes["hidden_size"] % sizes["head_dim"]:
        raise ScoreModeError(
            f"hidden_size is {sizes['hidden_size']}; it must be a multiple of head_dim, "
            f"{sizes['head_dim']}"
        )
    if not (math.isfinite(logit_std) and logit_std > 0):
        raise ScoreModeError(f"logit_std is {logit_std!r}; it must be a finite number above 0")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ScoreModeError(f"seed is {seed!r}; it must be a whole number from 0 to 2**31 - 1")
