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
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from vllm.score.checks import Count, Flag, Number, Seed, Whole, settings
from vllm.score.errors import ScoreModeError
from vllm.score.tiny.corpus import read_documents, train_tokenizer
from vllm.score.tiny.training import check_heads, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen3", "gpt2", "opt", "gemma2"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)
_Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"],
    BeforeValidator(lambda dtype: str(dtype).removeprefix("torch.")),
]
_GATED = ("llama", "qwen3", "gemma2")
_NORM_JITTER = 0.1
_BIAS_STD = 0.1


@settings
class RandomModel:
    """What `make_random_model` makes.

    Attributes:
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
        dtype: of the stored weights: float32, bfloat16 or float16; torch's dtypes are names, too.
        tie_word_embeddings: whether the head is the input embedding; by default as the
            architecture's best-known models have it (llama and qwen3 untied, the others tied).
        tokenizer: saved beside the model; by default a byte-level BPE of at most `vocab_size`
            entries, trained on a few docstrings of the standard library.
        config_overrides: further fields of the Hugging Face configuration, by their own names.
    """

    architecture: Architecture
    vocab_size: Count | None = None
    hidden_size: Count = 128
    num_layers: Count = 2
    head_dim: Annotated[Whole, Field(ge=32, multiple_of=2)] = 32
    intermediate_size: Count | None = None
    max_position_embeddings: Count = 2048
    logit_std: Annotated[Number, Field(gt=0)] = 3.0
    seed: Seed = 0
    dtype: _Dtype = "float32"
    tie_word_embeddings: Flag | None = None
    tokenizer: Any = None
    config_overrides: Mapping[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        check_heads(self.hidden_size, self.head_dim)
        if self.architecture == "gemma2" and not self.tied:
            raise ScoreModeError(
                "tie_word_embeddings=False with architecture='gemma2': vLLM's Gemma-2 always "
                "computes its logits with the input embedding; leave it out, or choose another "
                "architecture"
            )
        if self.tokenizer is not None and self.vocab_size and len(self.tokenizer) > self.vocab_size:
            raise ScoreModeError(
                f"vocab_size is {self.vocab_size}, but the tokenizer has {len(self.tokenizer)} "
                "entries; raise vocab_size or leave it out"
            )

    @property
    def tied(self) -> bool:
        """Whether the head is the input embedding."""
        if self.tie_word_embeddings is None:
            return self.architecture not in ("llama", "qwen3")
        return self.tie_word_embeddings


def make_random_model(directory: str | Path, architecture: str, **options: Any) -> Path:
    """Write a model of random weights, with its configuration and tokenizer, to a folder.

    The same arguments give the same bytes.

    Args:
        directory: folder to write to; made where it does not exist.
        architecture: one of `ARCHITECTURES`.
        options: further fields of `RandomModel`.

    Returns:
        The folder, as a path.

    Raises:
        ScoreModeError: for an argument that names no model this function can make, or none that
            vLLM can run.
    """
    wanted = RandomModel(architecture=architecture, **options)  # type: ignore[arg-type]
    vocab_size = wanted.vocab_size or (1024 if wanted.tokenizer is None else len(wanted.tokenizer))
    tokenizer = wanted.tokenizer or _default_tokenizer(vocab_size)

    import torch
    from transformers import AutoModelForCausalLM

    config = _configuration(wanted, tokenizer, vocab_size)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw_weights(model, wanted)
    model.to(getattr(torch, wanted.dtype))
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, tokenizer, path)
    return path


def _configuration(
    wanted: RandomModel, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> PreTrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    gated = wanted.architecture in _GATED
    width = wanted.intermediate_size or (3 if gated else 4) * wanted.hidden_size
    heads = wanted.hidden_size // wanted.head_dim
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": wanted.hidden_size,
        "num_hidden_layers": wanted.num_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": wanted.max_position_embeddings,
        "tie_word_embeddings": wanted.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    if gated:
        fields |= {"intermediate_size": width, "head_dim": wanted.head_dim}
        # Grouped-query attention where the number of heads allows it: the usual case today.
        fields["num_key_value_heads"] = heads // 2 if heads % 2 == 0 else heads
        if wanted.architecture == "gemma2":
            fields["query_pre_attn_scalar"] = wanted.head_dim
    elif wanted.architecture == "gpt2":
        fields |= {"n_inner": width, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        fields |= {"ffn_dim": width, "dropout": 0.0}
    known = AutoConfig.for_model(wanted.architecture)
    for name in wanted.config_overrides:
        if not hasattr(known, name):
            raise ScoreModeError(
                f"config_overrides names {name!r}, which {type(known).__name__} does not have"
            )
    try:
        return AutoConfig.for_model(wanted.architecture, **(fields | dict(wanted.config_overrides)))
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ScoreModeError(f"no {wanted.architecture} configuration: {error}") from error


def _draw_weights(model: PreTrainedModel, wanted: RandomModel) -> None:
    """Fill every parameter, each from a generator of its own: their order does not matter."""
    import torch

    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for name, weight in model.named_parameters():
        # PyTorch's generator on the CPU takes 32 bits of a seed and drops the rest.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{wanted.seed} {name}".encode()))
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
        with torch.no_grad():
            if weight is head:
                # The hidden state that the head sees is normed: its entries are of size 1.
                weight.copy_(noise * (wanted.logit_std / math.sqrt(weight.shape[1])))
            elif weight is embedding:
                weight.copy_(noise)
            elif weight.dim() == 1 and name.endswith("bias"):
                weight.copy_(noise * _BIAS_STD)
            elif weight.dim() == 1:
                weight.copy_(noise * _NORM_JITTER + _norm_centre(wanted.architecture, name))
            elif "wpe" in name or "embed_positions" in name:
                weight.copy_(noise * 0.5)
            else:
                fan_in = weight.shape[0] if wanted.architecture == "gpt2" else weight.shape[1]
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

    documents = read_documents(Path(email.__file__).parent)
    return train_tokenizer([document.text for document in documents], vocab_size)
