"""Teacher forcing: what a `SequenceProcessor` does with sequences that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.batches import Response, responses_of
from vllm.score.processor.checks import positive
from vllm.score.processor.functional import Functional
from vllm.score.processor.policy import SamplingPolicy
from vllm.score.processor.results import (
    diagnostics_results,
    results_with_grad,
    results_without_grad,
    to_numpy,
)
from vllm.score.processor.steps import StepValues
from vllm.score.processor.types import (
    BatchedSequences,
    DiagnosticsResults,
    GenerationConfig,
    LogprobResults,
)

if TYPE_CHECKING:
    from vllm.score.processor.backends import EngineBackend


class TeacherForcing(Functional):
    """Scores under the live model, under given parameters, or by an engine."""

    backend: str
    _config: GenerationConfig
    _engine: EngineBackend | None
    _tf_cfg: dict[str, Any]

    def teacher_force_logprobs(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
        params_override: Mapping[str, Tensor] | None = None,
        buffers_override: Mapping[str, Tensor] | None = None,
    ) -> LogprobResults:
        """Log-probabilities of the generated tokens under the model and the sampling policy.

        Args:
            sequences: of `generate_batched`, or made alike.
            with_grad: keep the graph of the live model's parameters.
            tf_batch_size: sequences at once (Hugging Face); by default the configuration's.
            compute_rb: with `rb_entropies`; and, with gradients and `config.rb_requires_grad`,
                with `rb_entropies_torch`.
            return_baseline_features: with `baseline_feats_torch` (with gradients only).
            params_override: parameters to use in place of the model's, as
                `_build_params_override` makes them (without gradients only).
            buffers_override: the same for buffers.

        Raises:
            ScoreModeError: the batch contradicts itself, names do not fit the model, options
                exclude each other, or a score is NaN.
        """
        return self._teacher_force(
            sequences,
            with_grad,
            tf_batch_size,
            compute_rb,
            return_baseline_features,
            _merged(params_override, buffers_override),
            diagnostics=False,
        )[0]

    def teacher_force_logprobs_with_diagnostics(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
        params_override: Mapping[str, Tensor] | None = None,
        buffers_override: Mapping[str, Tensor] | None = None,
    ) -> tuple[LogprobResults, DiagnosticsResults]:
        """`teacher_force_logprobs`, and the diagnostics of every response."""
        scores, diagnostics = self._teacher_force(
            sequences,
            with_grad,
            tf_batch_size,
            compute_rb,
            return_baseline_features,
            _merged(params_override, buffers_override),
            diagnostics=True,
        )
        assert diagnostics is not None
        return scores, diagnostics

    def _teacher_force(
        self,
        sequences: BatchedSequences,
        with_grad: bool,
        tf_batch_size: int | None,
        compute_rb: bool,
        features: bool,
        override: dict[str, Tensor] | None,
        *,
        diagnostics: bool,
    ) -> tuple[LogprobResults, DiagnosticsResults | None]:
        responses = responses_of(sequences)
        size = self._config.tf_batch_size if tf_batch_size is None else tf_batch_size
        batch_size = positive("tf_batch_size", size)
        if with_grad:
            if override is not None:
                raise ScoreModeError(
                    "params_override and buffers_override need with_grad=False: gradients are "
                    "those of the live model's own parameters."
                )
            return self._teacher_force_with_grad(
                responses, batch_size, compute_rb, features, diagnostics
            )
        if features:
            raise ScoreModeError("return_baseline_features=True needs with_grad=True.")
        return self._teacher_force_no_grad(responses, batch_size, compute_rb, override, diagnostics)

    def _teacher_force_no_grad(
        self,
        responses: list[Response],
        batch_size: int,
        compute_rb: bool,
        override: dict[str, Tensor] | None,
        diagnostics: bool,
    ) -> tuple[LogprobResults, DiagnosticsResults | None]:
        policy = SamplingPolicy.of(self._config)
        wanted = {"entropy": compute_rb or diagnostics, "diagnostics": diagnostics}
        values: list[StepValues[np.ndarray]]
        if self.backend == "vllm" and override is None:
            assert self._engine is not None
            values = self._engine.score(responses, policy, **wanted)
        else:
            backend = self._need_model("params_override")
            values = backend.score(
                responses, policy, override, batch_size=batch_size, profile=self._tf_cfg, **wanted
            )
        results = results_without_grad(responses, values, compute_rb)
        return results, diagnostics_results(responses, values) if diagnostics else None

    def _teacher_force_with_grad(
        self,
        responses: list[Response],
        batch_size: int,
        compute_rb: bool,
        features: bool,
        diagnostics: bool,
    ) -> tuple[LogprobResults, DiagnosticsResults | None]:
        values = self._need_model("with_grad=True").score_with_grad(
            responses,
            SamplingPolicy.of(self._config),
            batch_size=batch_size,
            entropy=compute_rb or diagnostics or features,
            diagnostics=diagnostics or features,
        )
        results = results_with_grad(
            responses,
            values,
            compute_rb=compute_rb,
            rb_requires_grad=self._config.rb_requires_grad,
            features=features,
        )
        if not diagnostics:
            return results, None
        return results, diagnostics_results(responses, [v.map(to_numpy) for v in values])


def _merged(
    params: Mapping[str, Tensor] | None, buffers: Mapping[str, Tensor] | None
) -> dict[str, Tensor] | None:
    for name, given in (("params_override", params), ("buffers_override", buffers)):
        if given is not None and not isinstance(given, Mapping):
            raise ScoreModeError(f"{name} must be a dict of tensors by name, got {given!r:.80}.")
    return None if params is None and buffers is None else {**(params or {}), **(buffers or {})}
