"""What samples responses and scores them: a vLLM engine, or a Hugging Face model in this process.

Both have `sizes`, a model's vocabulary size and its positions, `eos_token_ids`, `generate` and
`score`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vllm.score.api import score as score_with_engine
from vllm.score.armed import require_score_mode
from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import (
    HALVES,
    GenerationConfig,
    Precision,
    Profile,
    dtype_name,
    read_profile,
)
from vllm.score.processor.head import LOGITS_BYTES, causal_model, evaluating, map_logits
from vllm.score.processor.overrides import ZeroMapping, call_with, checked_mapping
from vllm.score.processor.results import StepValues, Wanted, step_values
from vllm.score.processor.sequences import (
    TAG,
    Response,
    RowBatch,
    after_answer,
    check_fit,
    eos_token_ids,
    padded,
    row_batches,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

# Values of a step that the engine computes as a statistic, by its name for it.
_STATISTICS = {
    "rb_entropy": "entropy",
    "head_mass": "head_mass",
    "margin": "margin",
    "collision": "collision_probability",
    "logit_var": "varentropy",
}


class EngineBackend:
    """A vLLM engine, in this process or in others."""

    def __init__(self, llm: LLM, tokenizer: Any, lora_request: LoRARequest | None) -> None:
        require_score_mode()
        self.llm = llm
        self.lora_request = lora_request
        config = llm.llm_engine.model_config
        self.sizes = int(config.get_vocab_size()), int(config.max_model_len)
        own = config.try_get_generation_config() or {}
        self.eos_token_ids = sorted(eos_token_ids(tokenizer, own.get("eos_token_id")))

    def generate(
        self, prompts: Sequence[list[int]], config: GenerationConfig, seed: int | None = None
    ) -> list[list[int]]:
        """G responses to each of B prompts, as `HuggingFaceBackend.generate` gives them; the engine
        batches by itself.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            n=config.num_return_sequences,
            temperature=config.temperature if config.do_sample else 0.0,
            top_p=config.top_p if config.do_sample else 1.0,
            max_tokens=config.max_new_tokens,
            stop=[TAG],
            include_stop_str_in_output=True,
            stop_token_ids=self.eos_token_ids,
            skip_special_tokens=False,
            seed=seed,
        )
        given = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(given, params, use_tqdm=False, lora_request=self.lora_request)
        return [list(each.token_ids) for output in outputs for each in output.outputs]

    def score(self, responses: Sequence[Response], wanted: Wanted) -> list[StepValues]:
        """Values of every response's steps, float32; no logits leave the worker.

        Raises:
            ScoreModeError: a sequence is too long for the engine, or its scores are unsound.
        """
        remedy = "start the engine with a larger max_model_len, or shorten the response"
        check_fit(responses, *self.sizes, remedy)
        config = wanted.config
        eos = self.eos_token_ids if wanted.diagnostics else []
        names = ["entropy"] * wanted.entropy
        if wanted.diagnostics:
            names = [*_STATISTICS.values(), "argmax_logprob", "logsumexp"]
        if config.temperature != 1 or config.top_p != 1:
            names.append("model_logprob")
        scores = score_with_engine(
            self.llm,
            [_request(r, eos) for r in responses if r.length],
            statistics=names,
            temperature=config.temperature,
            top_p=config.top_p,
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        nothing = np.empty((0, 1 + len(eos)), dtype=np.float32)
        empty = _values(nothing, dict.fromkeys(names, nothing[:, 0]))
        found = (_values(s.logprobs, s.statistics) for s in scores)
        return [next(found) if r.length else empty for r in responses]


def _request(response: Response, eos: list[int]) -> dict[str, Any]:
    targets = [[token, *eos] for token in response.generated.tolist()]
    return {"prompt_token_ids": response.ids.tolist(), "target_token_ids": targets}


def _values(logprobs: np.ndarray, statistics: Mapping[str, np.ndarray]) -> StepValues:
    """Of one response, by log q [T, 1 + k] of its tokens and the k end-of-sequence tokens."""
    logq = np.ascontiguousarray(logprobs[:, 0])
    values = {"logprob": statistics.get("model_logprob", logq), "logq": logq}
    values |= {name: statistics[s] for name, s in _STATISTICS.items() if s in statistics}
    if "logsumexp" in statistics:
        values["top1_prob"] = np.exp(statistics["argmax_logprob"])
        # H(q) = log sum exp a - E_q[a].
        values["logit_mean"] = statistics["logsumexp"] - statistics["entropy"]
    if logprobs.shape[1] > 1:
        values["eos_prob"] = np.exp(logprobs[:, 1:]).sum(axis=1)
    return {name: torch.from_numpy(value) for name, value in values.items()}


class HuggingFaceBackend:
    """A model in this process.

    Args:
        model: a causal language model; DistributedDataParallel is unwrapped, PEFT's wrappers stay.
        tokenizer: the model's.
        precision: dtypes.
    """

    logits_bytes = LOGITS_BYTES  # most at a time while scoring, at least one row

    def __init__(self, model: nn.Module, tokenizer: Any, precision: Precision) -> None:
        while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        self.target: Any = model
        self.tokenizer = tokenizer
        self.precision = precision
        self._params_zero = ZeroMapping(self.target)
        precision.apply_to_process()  # an engine multiplies as it was started to

    @property
    def sizes(self) -> tuple[int, int]:
        """Without end where the model's config does not say."""
        config: Any = getattr(causal_model(self.target), "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        names = ("vocab_size", "max_position_embeddings")
        vocab_size, positions = (getattr(config, name, None) or 1 << 31 for name in names)
        return vocab_size, positions

    @property
    def device(self) -> torch.device:
        return next(self.target.parameters()).device

    @property
    def eos_token_ids(self) -> Sequence[int]:
        own = getattr(self.target, "generation_config", None)
        return eos_token_ids(self.tokenizer, getattr(own, "eos_token_id", None))

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], config: GenerationConfig, seed: int | None = None
    ) -> list[list[int]]:
        """G responses to each of B prompts, under temperature and top-p alone.

        What the model's own generation_config says (top-k, penalties, suppressed tokens and so on)
        is left out, but for its end-of-sequence tokens: log q is what was sampled from. The model
        generates in eval mode, and is then as it was.

        Args:
            prompts: token ids, as `prompt_ids` gives them.
            config: all but `tf_batch_size` and `rb_requires_grad`.
            seed: of the sampling; None takes PyTorch's random numbers as they come.

        Returns:
            [B * G] lists of token ids, to be cut by `response_length`.

        Raises:
            ScoreModeError: there is no end-of-sequence token.
        """
        import transformers

        model, tokenizer, ends = self.target, self.tokenizer, self.eos_token_ids
        if not ends:
            raise ScoreModeError(
                "neither the tokenizer nor the model's generation_config names an end-of-sequence "
                "token; set tokenizer.eos_token."
            )
        pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # transformers' own top_k is 50; sampling fields beside do_sample=False make it warn.
        policy = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
        sampling = transformers.GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=pad,
            do_sample=config.do_sample,
            **(policy if config.do_sample else {}),
        )
        size = config.gen_batch_size
        rows = [prompt for prompt in prompts for _ in range(config.num_return_sequences)]
        found: list[list[int]] = []
        devices = [self.device] if self.device.type == "cuda" else []
        # With a seed, the caller's random numbers go on as if nothing had been drawn.
        rng = torch.random.fork_rng(devices, enabled=seed is not None)
        with evaluating(model), _own_settings_aside(model), rng:
            if seed is not None:
                torch.manual_seed(seed)
            for first in range(0, len(rows), size):
                ids, mask = padded(rows[first : first + size], pad, "left", self.device)
                width = ids.shape[1]
                stop = partial(after_answer, prompt_length=width, tokenizer=tokenizer)
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=sampling,
                    stopping_criteria=transformers.StoppingCriteriaList([stop]),
                )
                found += output[:, width:].tolist()
        return found

    def score(
        self,
        responses: Sequence[Response],
        wanted: Wanted,
        profile: Mapping[str, Any],
        *,
        graph: bool = False,
        override: Mapping[str, Tensor] | None = None,
    ) -> list[StepValues]:
        """The values of every response's steps.

        Args:
            responses: B * G sequences.
            wanted: with a graph, only `logprob`, `logq` and, if `wanted.entropy`, `rb_entropy`
                carry it.
            profile: "tf_withgrad" with a graph, else "tf_nograd"; see `config.Precision`.
            graph: with the graph of the live model, which runs in its own mode (dropout acts in
                training). Logits are computed again in the backward pass, a part at a time; the
                decoder's activations are kept, so memory grows with the number of responses.
                Without, the model runs by `torch.func.functional_call`, autocast and dropout off.
            override: without a graph, parameters and buffers by name; the others are the model's,
                in the profile's dtype.

        Returns:
            Tensors [T] in the order of `responses`, float32 or float64, on the model's device with
            a graph and else on the CPU.

        Raises:
            ScoreModeError: ids or parameters that do not fit the model, or logits with NaN.
        """
        # Nothing is computed on the last token.
        vocab_size, positions = self.sizes
        check_fit(responses, vocab_size, positions + 1, "shorten the response")
        checked = read_profile("tf_withgrad" if graph else "tf_nograd", profile)
        if graph:
            return self._score(responses, wanted, checked, fp64=False)
        moved = {} if override is None else checked_mapping(self.target, override)
        # A whole override needs no copy of the model's own parameters.
        whole = all(name in moved for name, _ in self.target.named_parameters())
        mapping = moved if whole else self._params_zero.get(checked.dtype) | moved
        work = partial(self._score, responses, wanted, checked, self.precision.entropy_fp64)
        with torch.no_grad(), evaluating(self.target):
            values = call_with(self.target, mapping, work)
        return [{name: v.cpu() for name, v in each.items()} for each in values]

    def _score(
        self, responses: Sequence[Response], wanted: Wanted, profile: Profile, fp64: bool
    ) -> list[StepValues]:
        """Under the parameters that the model has at the moment."""
        dtype = next(p.dtype for p in self.target.parameters() if p.is_floating_point())
        eos, device = self.eos_token_ids, self.device

        def compute(logits: Tensor, tokens: Tensor) -> StepValues:
            logits = logits.to(torch.float64 if fp64 else _scoring_dtype(logits.dtype, profile))
            values = step_values(logits, tokens, wanted, eos)
            carry = ["logprob", "logq"] + ["rb_entropy"] * wanted.entropy
            return {name: v if name in carry else v.detach() for name, v in values.items()}

        found: dict[int, StepValues] = {}
        for places, batch in row_batches(responses, wanted.config.tf_batch_size, device):
            pieces = map_logits(
                self.target,
                batch,
                compute,
                autocast=profile.autocast,
                logits_bytes=self.logits_bytes,
                itemsize=8 if fp64 or dtype == torch.float64 else 4,
                checkpointed=torch.is_grad_enabled(),
            )
            found.update(zip(places, _by_response(pieces, batch), strict=True))
        nothing = torch.zeros(0, max(eos, default=0) + 1, dtype=dtype, device=device)
        empty = compute(nothing, torch.zeros(0, dtype=torch.int64, device=device))
        return [found.get(place, empty) for place in range(len(responses))]


def _scoring_dtype(logits: torch.dtype, profile: Profile) -> torch.dtype:
    """The dtype of softmax, log-probabilities and entropies for logits of a dtype."""
    if logits not in HALVES:
        return logits
    if not profile.cast:
        raise ScoreModeError(
            f"cast_logits_fp32 is False, but the logits are {dtype_name(logits)}, in which a "
            "log-probability keeps two or three digits: set it to True, or the dtype to float32."
        )
    return torch.float32


def _by_response(pieces: Sequence[StepValues], batch: RowBatch) -> list[StepValues]:
    """The values of each response of a batch, from those of successive rows."""
    parts = {
        name: torch.cat([piece[name] for piece in pieces]).split(batch.lengths)
        for name in pieces[0]
    }
    found = [dict(zip(parts, each, strict=True)) for each in zip(*parts.values(), strict=True)]
    for response, values in zip(batch.responses, found, strict=True):
        if len(bad := values["logprob"].isnan().nonzero()):
            raise ScoreModeError(
                f"the logits of {response} at step {int(bad[0])} have NaN or +inf: check the "
                "parameters (and eta), or compute in a wider dtype."
            )
    return found


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Put an empty generation_config in place of the model's.

    `generate` takes from there what it is not given, and None counts as not given: "no suppressed
    tokens" cannot be said otherwise.
    """
    import transformers

    base: Any = causal_model(model)
    own = base.generation_config
    base.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
