"""The parts of a `SequenceProcessor` that work on given parameters or given logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.forward import fc_logits_noautocast
from vllm.score.processor.overrides import build_params_override, build_state_override
from vllm.score.processor.policy import SamplingPolicy, step_values

if TYPE_CHECKING:
    from vllm.score.processor.backends import HuggingFaceBackend


class Functional:
    """Needs `_hf`, the Hugging Face backend (or None), and `_fo_cfg`."""

    _hf: HuggingFaceBackend | None
    _fo_cfg: dict[str, Any]

    def _need_model(self, why: str) -> HuggingFaceBackend:
        if self._hf is None:
            raise ScoreModeError(
                f"{why} needs the Hugging Face model: SequenceProcessor(model, tokenizer, llm=...)."
            )
        return self._hf

    def _build_params_override(
        self, v_named: Mapping[str, Tensor], eta: float
    ) -> dict[str, Tensor]:
        """The parameters theta + eta v of the model, for `params_override`.

        Args:
            v_named: directions by parameter name; parameters without one stay where they are.
            eta: the step.

        Returns:
            Detached tensors by name, cast to `_fo_cfg`'s dtype if its `cast_params` says so.

        Raises:
            ScoreModeError: a name or a shape does not fit the model.
        """
        target = self._need_model("_build_params_override").target
        return build_params_override(target, v_named, eta, self._fo_cfg)

    def _build_state_override(
        self,
        v_named: Mapping[str, Tensor],
        eta: float,
        *,
        param_dtype: torch.dtype | None,
        include_buffers: bool,
        buffer_dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """As `_build_params_override`, in a given dtype (None: each its own), also of buffers."""
        return build_state_override(
            self._need_model("_build_state_override").target,
            v_named,
            eta,
            param_dtype=param_dtype,
            include_buffers=include_buffers,
            buffer_dtype=buffer_dtype,
        )

    def _fc_logits_noautocast(
        self, input_ids: Tensor, attention_mask: Tensor, params_mapping: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [B, L, V] of one forward under given parameters, autocast off, without a cache.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], padding on either side.
            params_mapping: as `_build_params_override` makes it.
        """
        target = self._need_model("_fc_logits_noautocast").target
        return fc_logits_noautocast(target, input_ids, attention_mask, params_mapping)

    def _rb_entropies_top_p(self, gen_logits: Tensor, top_p: float, temperature: float) -> Tensor:
        """Entropies [T] of the sampling policy at logits [T, V]; differentiable."""
        tokens = gen_logits.new_zeros(len(gen_logits), dtype=torch.int64)
        policy = SamplingPolicy(temperature, top_p)
        entropy = step_values(gen_logits, tokens, policy, diagnostics=False).rb_entropy
        assert entropy is not None
        return entropy

    def _compute_logq_top_p(
        self, gen_logits: Tensor, gen_tokens: Tensor, top_p: float, temperature: float
    ) -> Tensor:
        """log q [T] of the tokens [T] under the sampling policy at logits [T, V]."""
        policy = SamplingPolicy(temperature, top_p)
        return step_values(gen_logits, gen_tokens, policy, diagnostics=False, entropy=False).logq
