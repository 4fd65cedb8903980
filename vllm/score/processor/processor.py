"""`SequenceProcessor`: sample responses, score them, and describe the distributions on the way."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vllm.score.checks import Count, Seed, check, check_name
from vllm.score.engine.configuration import check_llm
from vllm.score.errors import ScoreModeError
from vllm.score.processor.backends import EngineBackend, HuggingFaceBackend
from vllm.score.processor.config import GenerationConfig, Precision, read_config, read_profile
from vllm.score.processor.datasets import Example, sample
from vllm.score.processor.overrides import build_state_override, forward_logits
from vllm.score.processor.results import (
    DiagnosticsResults,
    LogprobResults,
    StepValues,
    Wanted,
    baseline_features,
    diagnostics_pack,
    step_values,
    to_numpy,
)
from vllm.score.processor.rewards import AnswerJudge, tag_pref
from vllm.score.processor.sequences import (
    BatchedSequences,
    pad_batch,
    prompt_ids,
    response_length,
    responses_of,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

Made = TypeVar("Made")


class SequenceProcessor:
    """Batched generation, teacher forcing and diagnostics over one model.

    Args:
        model: a Hugging Face causal language model; DistributedDataParallel is unwrapped, PEFT
            wrappers are kept. None where only the engine is used.
        tokenizer: of the model; None takes the engine's.
        logger: for warnings; by default the module's.
        config: a `GenerationConfig`, or a dict with the sections "generation" (its fields) and
            "precision" (see `config.Precision`).
        backend: "hf", or "vllm": generation, and teacher forcing without gradients and overrides,
            by the engine `llm`. By default "vllm" if an engine is given.
        llm: a `vllm.LLM` of the same model, on which nothing else is running. It keeps its own
            weights and dtype: after a training step, reload them there.
        lora_request: the adapter that the engine applies.

    Raises:
        ScoreModeError: something of this is missing or contradicts itself.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        logger: logging.Logger | None = None,
        config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        backend: str | None = None,
        llm: LLM | None = None,
        lora_request: LoRARequest | None = None,
    ) -> None:
        self.config, self.precision = read_config(config)
        self.backend = _checked_backend(backend, model, llm, self.precision, lora_request)
        self.tokenizer = llm.get_tokenizer() if tokenizer is None and llm else tokenizer
        if not hasattr(self.tokenizer, "eos_token_id"):
            raise ScoreModeError(
                "tokenizer must be the model's Hugging Face tokenizer, got "
                f"{type(self.tokenizer).__name__}."
            )
        self.logger = logger or logging.getLogger(__name__)
        self.model = model
        self.llm = llm
        self._judge = AnswerJudge()
        self._engine = EngineBackend(llm, self.tokenizer, lora_request) if llm else None
        self._hf = HuggingFaceBackend(model, self.tokenizer, self.precision) if model else None
        # Attributes that the specification of this class names: two profiles, which may be changed,
        # and the model without DistributedDataParallel.
        self._fo_cfg, self._tf_cfg = self.precision.func_override, self.precision.tf_nograd
        self._mdl_target = None if self._hf is None else self._hf.target

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and not isinstance(value, GenerationConfig):
            raise ScoreModeError(
                f"config must be a GenerationConfig, got {type(value).__name__}: set its fields "
                "(processor.config.top_p = 0.9), update _fo_cfg and _tf_cfg for the precision, or "
                "give a dict when the processor is made."
            )
        super().__setattr__(name, value)

    # Prompts and responses

    def sample_prompts(
        self,
        dataset_name: str,
        split: str = "train",
        num_prompts: int | None = None,
        seed: int | None = None,
        **dataset_options: Any,
    ) -> tuple[list[str], list[Example]]:
        """Draw questions of a registered dataset without replacement; None takes all, in order.

        Returns:
            The prompts, and the examples that they come from (with their answers).
        """
        drawn = sample(dataset_name, split, num_prompts, seed, **dataset_options)
        return [example.question for example in drawn], drawn

    def generate_batched(
        self,
        prompts: Sequence[str],
        G: int | None = None,
        gen_batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> BatchedSequences:
        """Sample G responses per prompt, each up to an end of sequence or ``</answer>``.

        Args:
            prompts: [B] texts; they get the tokenizer's special tokens, once.
            G: responses per prompt; by default `config.num_return_sequences`.
            gen_batch_size: sequences at once (Hugging Face); by default the configuration's.
            seed: makes the call repeatable; by default the generators' states decide.

        Raises:
            ScoreModeError: there is no prompt, an empty one, or one too long.
        """
        config = self._config_of_call(
            num_return_sequences=check("G", G, Count | None), gen_batch_size=gen_batch_size
        )
        seed = check("seed", seed, Seed | None)
        backend = self._engine if self.backend == "vllm" else self._hf
        assert backend is not None
        vocab_size, positions = backend.sizes
        ids = prompt_ids(prompts, self.tokenizer, vocab_size)
        for i, prompt in enumerate(ids):
            if len(prompt) + config.max_new_tokens > positions:
                raise ScoreModeError(
                    f"prompts[{i}] has {len(prompt)} tokens: with max_new_tokens="
                    f"{config.max_new_tokens} that is more than the {positions} positions of "
                    "the model (of an engine: its max_model_len); shorten the prompt or lower "
                    "max_new_tokens."
                )
        ends = backend.eos_token_ids
        rows = [
            row[: response_length(row, self.tokenizer, ends)]
            for row in backend.generate(ids, config, seed)
        ]
        special = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return pad_batch(
            ids,
            _grouped(rows, config.num_return_sequences),
            pad_token_id=next(int(token) for token in special if token is not None),
            decode=lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=True)),
            device="cpu" if self._hf is None else self._hf.device,
        )

    def generate_with_logprobs(
        self,
        prompts: Sequence[str] | None = None,
        G: int | None = None,
        dataset_name: str | None = None,
        split: str = "train",
        num_prompts: int | None = None,
        seed: int | None = None,
        with_grad: bool = False,
        gen_batch_size: int | None = None,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        *,
        dataset_options: Mapping[str, Any] | None = None,
        examples: Sequence[Any] | None = None,
    ) -> tuple[BatchedSequences, LogprobResults, DiagnosticsResults]:
        """Generate, score and describe in one call.

        Args:
            prompts: texts; None draws `num_prompts` (None: all) from `dataset_name`.
            seed: of the draw of prompts.
            dataset_options: further arguments of the dataset, such as the path of "local_file".
            examples: of explicit prompts, whose `answer` the rewards compare with.

        The others: see `generate_batched` and `teacher_force_logprobs`.
        """
        if prompts is None:
            if dataset_name is None:
                raise ScoreModeError("prompts and dataset_name are both missing: give one of them.")
            options = _checked_dict("dataset_options", dataset_options)
            prompts, examples = self.sample_prompts(
                dataset_name, split, num_prompts, seed, **options
            )
        elif dataset_name is not None:
            raise ScoreModeError(f"give prompts or dataset_name={dataset_name!r}, not both.")
        sequences = self.generate_batched(prompts, G, gen_batch_size)
        scores, diagnostics = self.teacher_force_logprobs_with_diagnostics(
            sequences, with_grad, tf_batch_size, compute_rb
        )
        scores.rewards = self.compute_rewards(prompts, sequences, examples)
        return sequences, scores, diagnostics

    def generate_with_replacement_sampling(
        self,
        total_sequences: int,
        dataset_name: str,
        split: str = "train",
        max_prompts_pool: int | None = None,
        seed: int | None = None,
        *,
        dataset_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[BatchedSequences, LogprobResults, DiagnosticsResults]:
        """Independent draws from (uniform prompt) x (response): one response per drawn prompt.

        Args:
            total_sequences: B of the result; G is 1.
            max_prompts_pool: draw from the first so many questions only.
            seed: of the draw of prompts.
            kwargs: of `generate_with_logprobs`.
        """
        total_sequences = check("total_sequences", total_sequences, Count)
        if kwargs.pop("G", 1) != 1:
            self.logger.warning("G is 1 here: responses to one drawn prompt are not independent.")
        options = _checked_dict("dataset_options", dataset_options)
        _, pool = self.sample_prompts(dataset_name, split, **options)
        if max_prompts_pool is not None:
            pool = pool[: check("max_prompts_pool", max_prompts_pool, Count)]
        drawn = random.Random(seed).choices(pool, k=total_sequences)
        questions = [example.question for example in drawn]
        return self.generate_with_logprobs(questions, 1, examples=drawn, **kwargs)

    def compute_rewards(
        self,
        prompts: Sequence[str],
        sequences: BatchedSequences,
        examples: Sequence[Any] | None = None,
    ) -> list[list[float]]:
        """The `tag_pref` reward [B][G]; 0 where an example or its answer is missing."""
        known = [None] * len(prompts) if examples is None else check("examples", examples, list)
        if not len(known) == len(prompts) == len(sequences.responses_text):
            raise ScoreModeError(
                f"examples has {len(known)} entries for {len(prompts)} prompts; give one each, and "
                "the sequences of these prompts."
            )
        return [
            [tag_pref(text, getattr(example, "answer", None), self._judge) for text in group]
            for group, example in zip(sequences.responses_text, known, strict=True)
        ]

    # Teacher forcing

    def teacher_force_logprobs(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
        params_override: Mapping[str, Tensor] | None = None,
        buffers_override: Mapping[str, Tensor] | None = None,
        *,
        diagnostics: bool = False,
    ) -> LogprobResults:
        """Log-probabilities of the generated tokens under the model and the sampling policy.

        Args:
            sequences: of `generate_batched`, or made alike.
            with_grad: keep the graph of the live model's parameters.
            tf_batch_size: sequences at once (Hugging Face); by default the configuration's.
            compute_rb: with `rb_entropies`; and, with gradients and `config.rb_requires_grad`,
                with `rb_entropies_torch`.
            return_baseline_features: with `baseline_feats_torch` (with gradients only).
            params_override: parameters to use in place of the model's, as `build_params_override`
                makes them (without gradients only).
            buffers_override: the same for buffers.
            diagnostics: with `diagnostics` of every response.

        Raises:
            ScoreModeError: the batch contradicts itself, names do not fit the model, options
                exclude each other, or a score is NaN.
        """
        responses = responses_of(sequences)
        config = self._config_of_call(tf_batch_size=tf_batch_size)
        override = _checked_dict("params_override", params_override)
        override |= _checked_dict("buffers_override", buffers_override)
        if with_grad and override:
            raise ScoreModeError(
                "params_override and buffers_override need with_grad=False: gradients are those of "
                "the live model's own parameters."
            )
        if return_baseline_features and not with_grad:
            raise ScoreModeError("return_baseline_features=True needs with_grad=True.")
        described = diagnostics or return_baseline_features
        wanted = Wanted(config, compute_rb or described, described)
        if self.backend == "vllm" and not with_grad and not override:
            assert self._engine is not None
            values = self._engine.score(responses, wanted)
        else:
            model = self._need_model("with_grad=True" if with_grad else "params_override")
            profile = self.precision.tf_withgrad if with_grad else self._tf_cfg
            values = model.score(responses, wanted, profile, graph=with_grad, override=override)
        carried = with_grad and config.rb_requires_grad

        def of(make: Callable[[StepValues], Made]) -> list[list[Made]]:
            return _grouped([make(value) for value in values], len(sequences.gen_lens[0]))

        return LogprobResults(
            logprobs=of(lambda v: v["logprob"]),
            entropies=of(lambda v: -to_numpy(v["logprob"])),
            sequence_logprobs=of(lambda v: v["logprob"].sum(dtype=torch.float64).item()),
            rb_entropies=of(
                lambda v: to_numpy(v["rb_entropy"] if compute_rb else v["logprob"][:0])
            ),
            rewards=of(lambda v: 0.0),
            rb_entropies_torch=of(lambda v: v["rb_entropy"]) if compute_rb and carried else None,
            baseline_feats_torch=of(baseline_features) if return_baseline_features else None,
            token_logqs=of(lambda v: v["logq"]),
            sequence_logqs=of(lambda v: v["logq"].sum(dtype=torch.float64).item()),
            diagnostics=DiagnosticsResults(of(diagnostics_pack)) if diagnostics else None,
        )

    def teacher_force_logprobs_with_diagnostics(
        self, sequences: BatchedSequences, *args: Any, **options: Any
    ) -> tuple[LogprobResults, DiagnosticsResults]:
        """`teacher_force_logprobs` with its arguments, and the diagnostics of every response."""
        scores = self.teacher_force_logprobs(sequences, *args, diagnostics=True, **options)
        assert scores.diagnostics is not None
        return scores, scores.diagnostics

    # Given parameters, and given logits

    def build_params_override(self, v_named: Mapping[str, Tensor], eta: float) -> dict[str, Tensor]:
        """The parameters theta + eta v of the model, for `params_override`.

        Args:
            v_named: directions by parameter name; parameters without one stay where they are.
            eta: the step.
        """
        profile = read_profile("func_override", self._fo_cfg)
        dtype = profile.dtype if profile.cast else None
        return self.build_state_override(v_named, eta, param_dtype=dtype, include_buffers=False)

    def build_state_override(
        self, v_named: Mapping[str, Tensor], eta: float, **dtypes: Any
    ) -> dict[str, Tensor]:
        """As `build_params_override`, in a given dtype (None: each its own), also of buffers.

        Args:
            dtypes: param_dtype, include_buffers and buffer_dtype of
                `overrides.build_state_override`.
        """
        target = self._need_model("an override of parameters").target
        return build_state_override(target, v_named, eta, **dtypes)

    def forward_logits(
        self, input_ids: Tensor, attention_mask: Tensor, params_mapping: Mapping[str, Tensor]
    ) -> Tensor:
        """Logits [B, L, V] of one forward under given parameters, autocast off, without a cache.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], padding on either side.
            params_mapping: as `build_params_override` makes it.
        """
        target = self._need_model("forward_logits").target
        return forward_logits(target, input_ids, attention_mask, params_mapping)

    def policy_entropies(self, gen_logits: Tensor, top_p: float, temperature: float) -> Tensor:
        """Entropies [T] of the sampling policy at logits [T, V]; differentiable."""
        tokens = gen_logits.new_zeros(len(gen_logits), dtype=torch.int64)
        wanted = Wanted(GenerationConfig(temperature, top_p), diagnostics=False)
        return step_values(gen_logits, tokens, wanted)["rb_entropy"]

    def policy_logprobs(
        self, gen_logits: Tensor, gen_tokens: Tensor, top_p: float, temperature: float
    ) -> Tensor:
        """log q [T] of the tokens [T] under the sampling policy at logits [T, V]."""
        wanted = Wanted(GenerationConfig(temperature, top_p), entropy=False, diagnostics=False)
        return step_values(gen_logits, gen_tokens, wanted)["logq"]

    # The names that the specification of this class gives to methods above.
    _build_params_override = build_params_override
    _build_state_override = build_state_override
    _compute_logq_top_p = policy_logprobs
    _compute_rewards = compute_rewards
    _fc_logits_noautocast = forward_logits
    _rb_entropies_top_p = policy_entropies

    def _config_of_call(self, **given: Any) -> GenerationConfig:
        """`config` with what a call gives in its place."""
        changed = {name: value for name, value in given.items() if value is not None}
        return replace(self.config, **changed)

    def _need_model(self, why: str) -> HuggingFaceBackend:
        if self._hf is None:
            raise ScoreModeError(
                f"{why} needs the Hugging Face model: SequenceProcessor(model, tokenizer, llm=...)."
            )
        return self._hf


def _checked_backend(
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
    check_name("backend", chosen, ("hf", "vllm"))
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


def _grouped(entries: list[Made], each: int) -> list[list[Made]]:
    """[B][G] of [B * G] entries."""
    return [entries[first : first + each] for first in range(0, len(entries), each)]


def _checked_dict(field: str, value: Any) -> dict[str, Any]:
    return check(field, value, dict[str, Any] | None) or {}
