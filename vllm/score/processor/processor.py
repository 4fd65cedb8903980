"""`SequenceProcessor`: sample responses, score them, and describe the distributions on the way."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.score.errors import ScoreModeError
from vllm.score.processor import examples, rewards
from vllm.score.processor.backends import EngineBackend, HuggingFaceBackend, check_backend
from vllm.score.processor.batches import pad_batch
from vllm.score.processor.checks import check_seed, positive
from vllm.score.processor.generation import prompt_ids
from vllm.score.processor.precision import apply_global_precision
from vllm.score.processor.settings import read_config
from vllm.score.processor.teacher_forcing import TeacherForcing
from vllm.score.processor.types import (
    BatchedSequences,
    DiagnosticsResults,
    GenerationConfig,
    LogprobResults,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


class SequenceProcessor(TeacherForcing):
    """Batched generation, teacher forcing and diagnostics over one model.

    Args:
        model: a Hugging Face causal language model; DistributedDataParallel is unwrapped, PEFT
            wrappers are kept. None where only the engine is used.
        tokenizer: of the model; None takes the engine's.
        logger: for warnings; by default the module's.
        config: a `GenerationConfig`, or a dict with the sections "generation" (its fields) and
            "precision" (see `settings.Precision`).
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
        self._config, precision = read_config(config)
        self.backend = check_backend(backend, model, llm, precision, lora_request)
        if tokenizer is None and llm is None:
            raise ScoreModeError("tokenizer is missing: give the model's.")
        if tokenizer is not None and not hasattr(tokenizer, "eos_token_id"):
            raise ScoreModeError(
                f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer).__name__}."
            )
        self.tokenizer = llm.get_tokenizer() if tokenizer is None and llm else tokenizer
        self.logger = logger or logging.getLogger(__name__)
        self.model = model
        self.llm = llm
        self._precision = precision
        self._fo_cfg, self._tf_cfg = precision.func_override, precision.tf_nograd
        self._engine = EngineBackend(llm, self.tokenizer, lora_request) if llm else None
        self._hf = None if model is None else HuggingFaceBackend(model, self.tokenizer, precision)
        self._mdl_target = None if self._hf is None else self._hf.target
        # An engine in this process multiplies as it was started to.
        if model is not None:
            apply_global_precision(precision.allow_tf32, precision.matmul_precision)

    @property
    def config(self) -> GenerationConfig:
        """The generation settings; their fields may be changed."""
        return self._config

    @config.setter
    def config(self, value: GenerationConfig) -> None:
        if not isinstance(value, GenerationConfig):
            raise ScoreModeError(
                f"config must be a GenerationConfig, got {type(value).__name__}: set its fields "
                "(processor.config.top_p = 0.9), update _fo_cfg and _tf_cfg for the precision, or "
                "give a dict when the processor is made."
            )
        self._config = value

    # Prompts and responses

    def sample_prompts(
        self,
        dataset_name: str,
        split: str = "train",
        num_prompts: int | None = None,
        seed: int | None = None,
        **dataset_options: Any,
    ) -> tuple[list[str], list[examples.Example]]:
        """Draw questions of a registered dataset without replacement; None takes all, in order.

        Returns:
            The prompts, and the examples that they come from (with their answers).
        """
        drawn = examples.sample(dataset_name, split, num_prompts, seed, **dataset_options)
        return [example.question for example in drawn], drawn

    def generate_batched(
        self,
        prompts: Sequence[str],
        G: int | None = None,
        gen_batch_size: int | None = None,
        *,
        seed: int | None = None,
    ) -> BatchedSequences:
        """Sample G responses a prompt, each up to an end of sequence or ``</answer>``.

        Args:
            prompts: [B] texts; they get the tokenizer's special tokens, once.
            G: responses a prompt; by default `config.num_return_sequences`.
            gen_batch_size: sequences at once (Hugging Face); by default the configuration's.
            seed: makes the call repeatable; by default the generators' states decide.

        Raises:
            ScoreModeError: there is no prompt, an empty one, or one too long.
        """
        count = self.config.num_return_sequences if G is None else positive("G", G)
        check_seed(seed)
        size = self.config.gen_batch_size if gen_batch_size is None else gen_batch_size
        batch_size = positive("gen_batch_size", size)
        backend = self._engine if self.backend == "vllm" else self._hf
        assert backend is not None
        ids = prompt_ids(prompts, self.tokenizer, backend.vocab_size)
        responses = backend.generate(ids, count, self.config, batch_size=batch_size, seed=seed)
        return pad_batch(
            ids,
            responses,
            pad_token_id=self._pad_token_id,
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
            options = _options(dataset_options)
            prompts, examples = self.sample_prompts(
                dataset_name, split, num_prompts, seed, **options
            )
        elif dataset_name is not None:
            raise ScoreModeError(f"give prompts or dataset_name={dataset_name!r}, not both.")
        sequences = self.generate_batched(prompts, G, gen_batch_size)
        scores, diagnostics = self.teacher_force_logprobs_with_diagnostics(
            sequences, with_grad, tf_batch_size, compute_rb
        )
        scores.rewards = self._compute_rewards(prompts, sequences, examples)
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
        """Independent draws from (uniform prompt) x (response): one response a drawn prompt.

        Args:
            total_sequences: B of the result; G is 1.
            max_prompts_pool: draw from the first so many questions only.
            seed: of the draw of prompts.
            kwargs: of `generate_with_logprobs`.
        """
        positive("total_sequences", total_sequences)
        if kwargs.pop("G", 1) != 1:
            self.logger.warning("G is 1 here: responses to one drawn prompt are not independent.")
        _, pool = self.sample_prompts(dataset_name, split, **_options(dataset_options))
        if max_prompts_pool is not None:
            pool = pool[: positive("max_prompts_pool", max_prompts_pool)]
        drawn = random.Random(seed).choices(pool, k=total_sequences)
        questions = [example.question for example in drawn]
        return self.generate_with_logprobs(questions, 1, examples=drawn, **kwargs)

    def _compute_rewards(
        self,
        prompts: Sequence[str],
        sequences: BatchedSequences,
        examples: Sequence[Any] | None = None,
    ) -> list[list[float]]:
        """The `tag_pref` reward [B][G]; 0 where an example or its answer is missing."""
        if examples is not None and not isinstance(examples, Sequence):
            raise ScoreModeError(f"examples must be a list, got {type(examples).__name__}.")
        if examples is not None and len(examples) != len(prompts):
            raise ScoreModeError(
                f"examples has {len(examples)} entries for {len(prompts)} prompts."
            )
        golds = None if examples is None else [getattr(e, "answer", None) for e in examples]
        return rewards.rewards(sequences.responses_text, golds)

    @property
    def _pad_token_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        eos = self.tokenizer.eos_token_id
        return int(pad if pad is not None else eos if eos is not None else 0)


def _options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise ScoreModeError(f"dataset_options must be a dict, got {given!r:.80}.")
    return dict(given or {})
