"""Random drafters for speculative decoding, in the file formats of real ones.

They draft nonsense, which the target turns down: what counts is that they run beside score
requests. `draft_model` needs none of these; any small model drafts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm.score.tiny.random_models import make_random_model

HEADS = 3


def make_drafter(folder: Path, method: str, hidden_size: int, vocab_size: int) -> Path:
    """A head of the method eagle, eagle3 or medusa for a model of these sizes with two layers."""
    if method == "medusa":
        return _medusa(folder, hidden_size, vocab_size)
    sizes = {"hidden_size": hidden_size, "vocab_size": vocab_size, "num_layers": 1}
    make_random_model(folder, "llama", seed=6, **sizes)
    weights = {k.removeprefix("model."): v for k, v in load_file(_file(folder)).items()}
    if method == "eagle":
        for name in ("norm.weight", "lm_head.weight", "layers.0.input_layernorm.weight"):
            del weights[name]
    else:
        weights = {k.replace("layers.0", "midlayer"): v for k, v in weights.items()}
        for name in ("q_proj", "k_proj", "v_proj"):
            key = f"midlayer.self_attn.{name}.weight"
            weights[key] = _random(len(weights[key]), 2 * hidden_size)
        weights["midlayer.hidden_norm.weight"] = torch.ones(hidden_size)
        _set(folder, architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=vocab_size)
        _set(folder, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]})
    weights["fc.weight"] = _random(hidden_size, 2 * hidden_size)
    save_file(weights, _file(folder), metadata={"format": "pt"})
    return folder


def make_mtp_model(folder: Path) -> Path:
    """A random Qwen2, with the MTP layer of MiMo. Hugging Face reads it without that layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    make_random_model(folder, "qwen3")  # for its tokenizer
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {
        name: 1 + 0.1 * _random(*w.shape) if "norm" in name else _random(*w.shape, scale=1.0)
        for name, w in model.state_dict().items()
    }
    weights["lm_head.weight"] *= 3  # the logits' standard deviation, in nats
    mtp = "model.mtp_layers.0."
    for name in [name for name in weights if ".layers.0." in name]:
        weights[name.replace("model.layers.0.", mtp)] = weights[name].clone()
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{mtp}{name}.weight"] = torch.ones(128)
    weights[f"{mtp}input_proj.weight"] = _random(128, 256)
    config.save_pretrained(folder)
    save_file(weights, _file(folder), metadata={"format": "pt"})
    _set(folder, architectures=["MiMoForCausalLM"], num_nextn_predict_layers=1)
    return folder


def _medusa(folder: Path, hidden_size: int, vocab_size: int) -> Path:
    folder.mkdir(parents=True)
    weights = {}
    for head in range(HEADS):
        weights[f"blocks.{head}.layers.0.weight"] = _random(hidden_size, hidden_size)
        weights[f"lm_heads.{head}.weight"] = _random(vocab_size, hidden_size)
    save_file(weights, _file(folder), metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    _set(folder, architectures=["MedusaModel"], model_type="medusa", dtype="float32")
    _set(folder, hidden_size=hidden_size, vocab_size=vocab_size, num_hidden_layers=1)
    return _set(folder, num_heads=HEADS, max_position_embeddings=2048)


def _file(folder: Path) -> Path:
    return folder / "model.safetensors"


def _set(folder: Path, **fields: Any) -> Path:
    """Set fields of a configuration."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def _random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers that keep the size of what they multiply."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) * (scale / shape[-1] ** 0.5)
