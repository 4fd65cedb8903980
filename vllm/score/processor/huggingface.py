"""A Hugging Face model that samples responses and scores them, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm.score.errors import ScoreModeError
from vllm.score.processor.config import (
    HALVES,
    GenerationConfig,
    Precision,
    Profile,
    dtype_name,
    read_profile,
)
from vllm.score.processor.head import (
    LOGITS_BYTES,
    causal_model,
    evaluating,
    map_logits,
    sizes,
    unwrap_ddp,
)
from vllm.score.processor.overrides import ZeroMapping, call_with, checked_mapping
from vllm.score.processor.policy import StepValues, Wanted, step_values
from vllm.score.processor.sequences import (
    Response,
    RowBatch,
    StopAfterAnswer,
    check_fit,
    eos_token_ids,
    padded,
    response_length,
    row_batches,
)


class HuggingFaceBackend:
    """A model in this process.

    Args:
        model: a causal language model; DistributedDataParallel is unwrapped, PEFT's wrappers stay.
        tokenizer: the model's.
        precision: dtypes.
    """

    logits_bytes = LOGITS_BYTES  # most at a time while scoring, at least one row

    def __init__(self, model: torch.nn.Module, tokenizer: Any, precision: Precision) -> None:
        self.target: Any = unwrap_ddp(model)
        self.tokenizer = tokenizer
        self.precision = precision
        self._params_zero = ZeroMapping(self.target)

    @property
    def vocab_size(self) -> int:
        return sizes(self.target)[0]

    @property
    def longest(self) -> int:
        """Positions of the model."""
        return sizes(self.target)[1]

    @property
    def device(self) -> torch.device:
        return next(self.target.parameters()).device

    @property
    def eos_token_ids(self) -> Sequence[int]:
        own = getattr(self.target, "generation_config", None)
        return eos_token_ids(self.tokenizer, getattr(own, "eos_token_id", None))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[list[int]],
        config: GenerationConfig,
        seed: int | None = None,
    ) -> list[list[list[int]]]:
        """Responses to each of B prompts, under temperature and top-p alone.

        What the model's own generation_config says (top-k, penalties, suppressed tokens and so on)
        is left out, but for its end-of-sequence tokens: log q is what was sampled from. The model
        generates in eval mode, and is then as it was.

        Args:
            prompts: token ids, as `prompt_ids` gives them.
            config: all but `tf_batch_size` and `rb_requires_grad`.
            seed: of the sampling; None takes PyTorch's random numbers as they come.

        Returns:
            [B][G] lists of token ids, cut by `response_length`.

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
        count, size = config.num_return_sequences, config.gen_batch_size
        rows = [prompt for prompt in prompts for _ in range(count)]
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
                stop = StopAfterAnswer(width, tokenizer, ends[0])
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=sampling,
                    logits_processor=transformers.LogitsProcessorList([stop]),
                )
                found += output[:, width:].tolist()
        cut = [row[: response_length(row, tokenizer, ends)] for row in found]
        return [cut[first : first + count] for first in range(0, len(cut), count)]

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
        check_fit(responses, self.vocab_size, self.longest + 1, "shorten the response")
        checked = read_profile("tf_withgrad" if graph else "tf_nograd", profile)
        if graph:
            return self._score(responses, wanted, checked, fp64=False)
        moved = {} if override is None else checked_mapping(self.target, override)
        # A whole override needs no copy of the model's own parameters.
        whole = all(name in moved for name, _ in self.target.named_parameters())
        mapping = moved if whole else self._params_zero.get(checked.dtype) | moved
        fp64 = self.precision.entropy_fp64
        work = partial(self._score, responses, wanted, checked, fp64)
        with torch.no_grad(), evaluating(self.target):
            values = call_with(self.target, mapping, work)
        return [value.map(Tensor.cpu) for value in values]

    def _score(
        self, responses: Sequence[Response], wanted: Wanted, profile: Profile, fp64: bool
    ) -> list[StepValues]:
        """Under the parameters that the model has at the moment."""
        dtype = next(p.dtype for p in self.target.parameters() if p.is_floating_point())
        eos, device = self.eos_token_ids, self.device

        def compute(logits: Tensor, tokens: Tensor) -> StepValues:
            logits = logits.to(torch.float64 if fp64 else _scoring_dtype(logits.dtype, profile))
            values = step_values(logits, tokens, wanted, eos)
            detached = values.map(Tensor.detach)
            entropy = values.rb_entropy if wanted.entropy else detached.rb_entropy
            return replace(detached, logprob=values.logprob, logq=values.logq, rb_entropy=entropy)

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
    names = list(pieces[0].computed())
    whole = [torch.cat([getattr(piece, name) for piece in pieces]) for name in names]
    parts = zip(*(tensor.split(batch.lengths) for tensor in whole), strict=True)
    found = [StepValues(**dict(zip(names, tensors, strict=True))) for tensors in parts]
    for response, value in zip(batch.responses, found, strict=True):
        if len(bad := value.logprob.isnan().nonzero()):
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
