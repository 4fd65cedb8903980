"""What generates and scores: a Hugging Face model, or a vLLM engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.processor import generation
from vllm.score.processor.batches import Response
from vllm.score.processor.no_grad import score_no_grad
from vllm.score.processor.overrides import ZeroMapping, checked_mapping
from vllm.score.processor.policy import SamplingPolicy
from vllm.score.processor.settings import Precision, read_profile
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import GenerationConfig
from vllm.score.processor.with_grad import score_with_grad

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

BACKENDS = ("hf", "vllm")


def check_backend(
    backend: str | None, model: Any, llm: Any, precision: Precision, lora_request: Any
) -> str:
    """The backend's name, once what it needs is known to be there.

    Raises:
        ScoreModeError: it is unknown, its model is missing, or it cannot do what is asked.
    """
    if not isinstance(model, (torch.nn.Module, type(None))):
        raise ScoreModeError(
            f"model must be a Hugging Face model, got {type(model).__name__}; give an engine as "
            "llm=..."
        )
    if llm is not None:
        check_llm(llm)
    chosen = backend or ("hf" if llm is None else "vllm")
    if chosen not in BACKENDS:
        raise ScoreModeError(f"backend={backend!r} is unknown: choose from {', '.join(BACKENDS)}.")
    if chosen == "hf" and model is None:
        raise ScoreModeError("backend='hf' needs model, a Hugging Face causal language model.")
    if chosen == "vllm" and llm is None:
        raise ScoreModeError("backend='vllm' needs llm, a vllm.LLM of the same model.")
    if chosen == "vllm" and precision.entropy_fp64:
        raise ScoreModeError(
            "precision.entropy_fp64=True needs backend='hf': the engine computes in float32."
        )
    if lora_request is not None and llm is None:
        raise ScoreModeError("lora_request needs llm; for backend='hf' give a PEFT model.")
    return chosen


class HuggingFaceBackend:
    """A model in this process."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, precision: Precision) -> None:
        self.target: torch.nn.Module = generation.unwrap_ddp(model)
        self.tokenizer = tokenizer
        self.precision = precision
        self.eos_token_ids = generation.eos_token_ids(self.target, tokenizer)
        self._params_zero = ZeroMapping(self.target)

    @property
    def vocab_size(self) -> int:
        return generation.vocabulary_size(self.target)

    @property
    def device(self) -> torch.device:
        return next(self.target.parameters()).device

    def generate(
        self,
        prompts: list[list[int]],
        num_responses: int,
        config: GenerationConfig,
        *,
        batch_size: int,
        seed: int | None,
    ) -> list[list[list[int]]]:
        """Responses [B][G] to prompts [B], as token ids."""
        return generation.generate(
            self.target,
            self.tokenizer,
            prompts,
            num_responses,
            config,
            batch_size=batch_size,
            seed=seed,
        )

    def score(
        self,
        responses: Sequence[Response],
        policy: SamplingPolicy,
        override: Mapping[str, Tensor] | None,
        *,
        batch_size: int,
        profile: dict[str, Any],
        entropy: bool,
        diagnostics: bool,
    ) -> list[StepValues[np.ndarray]]:
        """Values of every response's steps, without gradients; `override` names parameters."""
        checked = read_profile("tf_nograd", profile)
        moved = {} if override is None else checked_mapping(self.target, override)
        # A whole override needs no copy of the model's own parameters.
        whole = all(name in moved for name, _ in self.target.named_parameters())
        mapping = moved if whole else self._params_zero.get(checked.dtype) | moved
        return score_no_grad(
            self.target,
            mapping,
            responses,
            policy,
            batch_size=batch_size,
            entropy_fp64=self.precision.entropy_fp64,
            cast_logits_fp32=checked.cast,
            eos_token_ids=self.eos_token_ids,
            diagnostics=diagnostics,
            entropy=entropy,
        )

    def score_with_grad(
        self,
        responses: Sequence[Response],
        policy: SamplingPolicy,
        *,
        batch_size: int,
        entropy: bool,
        diagnostics: bool,
    ) -> list[StepValues[Tensor]]:
        """Values of every response's steps, with the graph of the live parameters."""
        return score_with_grad(
            self.target,
            responses,
            policy,
            batch_size=batch_size,
            profile=self.precision.tf_withgrad,
            eos_token_ids=self.eos_token_ids,
            entropy=entropy,
            features=diagnostics,
        )


class EngineBackend:
    """A vLLM engine, in this process or in others."""

    def __init__(self, llm: LLM, tokenizer: Any, lora_request: LoRARequest | None) -> None:
        from vllm.score.armed import require_score_mode
        from vllm.score.processor.engine_generation import engine_eos_token_ids

        require_score_mode()
        self.llm = llm
        self.tokenizer = tokenizer
        self.lora_request = lora_request
        ids = [*generation.eos_token_ids(None, tokenizer), *engine_eos_token_ids(llm)]
        self.eos_token_ids = sorted(set(ids))

    @property
    def vocab_size(self) -> int:
        return int(self.llm.llm_engine.model_config.get_vocab_size())

    def generate(
        self,
        prompts: list[list[int]],
        num_responses: int,
        config: GenerationConfig,
        *,
        batch_size: int,
        seed: int | None,
    ) -> list[list[list[int]]]:
        """Responses [B][G] to prompts [B]; the engine batches by itself."""
        from vllm.score.processor.engine_generation import generate_with_engine

        return generate_with_engine(
            self.llm,
            self.tokenizer,
            prompts,
            num_responses,
            config,
            eos_token_ids=self.eos_token_ids,
            seed=seed,
            lora_request=self.lora_request,
        )

    def score(
        self,
        responses: Sequence[Response],
        policy: SamplingPolicy,
        *,
        entropy: bool,
        diagnostics: bool,
    ) -> list[StepValues[np.ndarray]]:
        """Values of every response's steps, float32."""
        from vllm.score.processor.engine_scoring import score_with_engine

        return score_with_engine(
            self.llm,
            responses,
            policy,
            eos_token_ids=self.eos_token_ids,
            entropy=entropy,
            diagnostics=diagnostics,
            lora_request=self.lora_request,
        )
