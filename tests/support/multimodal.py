"""Small multimodal models with random weights, whose processors work without torchvision.

vLLM's own modules of most such models (Gemma-3, Qwen3-VL and 3.5, Mistral-3, Llama-4, LLaVA) import
torchvision, which the CPU installation of this package leaves out. Its Idefics-3 does not, and
neither does its Transformers backend, which runs Hugging Face's own code of a model.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 640
IMAGE_SIZE = 56  # pixels


def make_idefics3(folder: Path, tokenizer: Any) -> Path:
    """An image is 4 embeddings between 3 tokens that its processor writes around them."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig
    from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

    tokenizer = _with_tokens(
        tokenizer,
        image_token="<image>",
        fake_token="<fake_token_around_image>",
        global_token="<global-img>",
        end_token="<end_of_utterance>",
    )
    config = Idefics3Config(
        text_config=LlamaConfig(**_text(tokenizer)),
        vision_config=Idefics3VisionConfig(**_vision()),
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    size = {"longest_edge": IMAGE_SIZE}
    images = Idefics3ImageProcessorPil(size=size, max_image_size=size)
    _save(Idefics3ForConditionalGeneration(config), folder)
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)
    return folder


def make_gemma3(folder: Path, tokenizer: Any) -> Path:
    """Layers with a sliding window of 24 tokens, and one without."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

    tokenizer = _with_tokens(
        tokenizer,
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    layers = {"num_hidden_layers": 3, "sliding_window": 24, "layer_types": kinds}
    config = Gemma3Config(
        text_config={**_text(tokenizer), **layers, "query_pre_attn_scalar": 32},
        vision_config={**_vision(), "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = Gemma3ImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    _save(Gemma3ForConditionalGeneration(config), folder)
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


def _with_tokens(tokenizer: Any, **tokens: str) -> Any:
    """The tokenizer with further tokens, each known by a name."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=tokens,
    )


def _text(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 14,
    }


def _save(model: Any, folder: Path) -> None:
    """Random weights that keep the size of their input, and logits of a few nats."""
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            if weight is head:
                weight.copy_(noise * 3 / math.sqrt(weight.shape[1]))
            elif weight is embedding:
                weight.copy_(noise)
            elif weight.dim() == 1:
                weight.copy_(noise * 0.1 + weight.mean())
            else:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
    model.save_pretrained(folder)
