"""Random weights that an engine and Hugging Face draw alike, and a look at hidden states.

vLLM's own dummy weights give flat logits and differ between tensor-parallel sizes. Here every
tensor of the Hugging Face checkpoint is drawn by its name: whoever draws it on the same kind of
device gets the same numbers, and no file is written. Imported by the engine's workers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch

from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "random_by_name"
WEIGHT_STD = 0.02
# Over a row of logits. Trained models have a few nats, and heavy tails: the norms of the
# vocabulary's vectors are log-normal, so that the largest logits are ten deviations out.
LOGIT_STD = 3.0
NORM_SPREAD = 0.3
VOCABULARY_TILE = 16_384


def head_name(config: Any) -> str:
    """The tensor that the logits are computed with."""
    return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"


def draw(name: str, shape: torch.Size, config: Any, device: torch.device) -> torch.Tensor:
    """The bfloat16 tensor of this name."""
    if len(shape) == 1:
        norm = torch.ones(shape, dtype=torch.bfloat16, device=device)
        if name == "model.norm.weight":
            a_unit = WEIGHT_STD * math.exp(NORM_SPREAD**2) * math.sqrt(config.hidden_size)
            norm *= LOGIT_STD / a_unit
        return norm
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    weight.normal_(0.0, WEIGHT_STD, generator=generator)
    if name == head_name(config):
        norms = torch.empty(shape[0], 1, dtype=torch.float32, device=device)
        norms.normal_(0.0, NORM_SPREAD, generator=generator)
        weight *= norms.exp_().to(torch.bfloat16)
    return weight


def tensor_shapes(config: Any) -> dict[str, torch.Size]:
    """Names and shapes of a Hugging Face checkpoint of this configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def checkpoint(config: Any, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the checkpoint, drawn one at a time."""
    for name, shape in tensor_shapes(config).items():
        yield name, draw(name, shape, config, device)


def hugging_face_model(folder: str, device: str) -> Any:
    """`AutoModelForCausalLM` in bfloat16 with these weights, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, config, parameter.device))
    return model.eval()


@register_model_loader(LOAD_FORMAT)
class RandomWeights(BaseModelLoader):
    """Gives the model these weights the way a checkpoint's are given, shards included."""

    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: Any, model_config: Any) -> None:
        device = next(model.parameters()).device
        model.load_weights(checkpoint(model_config.hf_config, device))


class HiddenStates:
    """A worker extension: what the head was given, and the exact scores of that.

    Meant for eager engines and one prompt a step: a forward pass that is replayed from a CUDA
    graph calls no hook.
    """

    def capture_hidden_states(self) -> None:
        """From now on keep what the model's forward pass returns."""
        self.captured: list[torch.Tensor] = []
        self.get_model().register_forward_hook(  # type: ignore[attr-defined]
            lambda module, inputs, output: self.captured.append(output.detach().clone())
        )

    def exact_logprobs(self, targets: list[int]) -> dict[str, Any] | None:
        """Log-probabilities by a float64 head over the hidden states of the last prompt.

        Args:
            targets: the token after each of the first positions.

        Returns:
            {logprobs, logit_std, logit_max} from the first rank, None from the others.
        """
        captured, self.captured = self.captured, []
        if self.rank != 0:  # type: ignore[attr-defined]
            return None
        steps = [c for c in captured if len(c) >= len(targets)]
        if len(steps) != 1:
            raise RuntimeError(
                f"{len(steps)} forward passes of {len(targets)} rows or more, rows "
                f"{[len(c) for c in captured]}: expected one, of the whole prompt."
            )
        config = self.model_config.hf_config  # type: ignore[attr-defined]
        hidden = steps[0][: len(targets)].double()
        weight = getattr(self, "head_weight", None)
        if weight is None:
            shape = torch.Size((config.vocab_size, config.hidden_size))
            self.head_weight = weight = draw(head_name(config), shape, config, hidden.device)
        ids = torch.tensor(targets, device=hidden.device)
        chosen = (hidden * weight[ids].double()).sum(-1)
        normaliser = torch.full_like(chosen, -math.inf)
        squares, largest = torch.zeros_like(chosen), 0.0
        for first in range(0, len(weight), VOCABULARY_TILE):
            logits = hidden @ weight[first : first + VOCABULARY_TILE].double().t()
            normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1))
            squares += logits.square().sum(-1)
            largest = max(largest, float(logits.abs().max()))
        return {
            "logprobs": (chosen - normaliser).tolist(),
            "logit_std": float((squares / len(weight)).sqrt().mean()),
            "logit_max": largest,
        }
