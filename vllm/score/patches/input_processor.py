"""Admission: a score request becomes an engine request with targets and no tokens to generate."""

from __future__ import annotations

import copy
import functools
import weakref
from types import ModuleType
from typing import Any

import wrapt

from vllm.score.engine.request import PLAN, ModelFacts, ScorePlan, plan_tokenised
from vllm.score.engine.token_texts import ANY_ID
from vllm.score.ops.row_layout import FULL_VOCABULARY
from vllm.score.patches.patch import Patch
from vllm.score.patches.renderers_base import KEY
from vllm.score.server.params import MARK, Explicit

# Set on the input processor by the patch of LLMEngine: an offline user asks for what he likes.
NO_CLIENT_LIMIT = "score_mode_no_client_limit"
# Set on it when a score was NaN: so may be a part of the KV cache.
NAN_SEEN = "score_mode_nan_seen"


def process_inputs(wrapped: Any, processor: Any, args: Any, kwargs: Any) -> Any:
    """Wrapper of `InputProcessor.process_inputs`."""

    def call(request_id: str, prompt: Any, params: Any, *rest: Any, **named: Any) -> Any:
        if not getattr(params, "score_mode", False):
            if isinstance(prompt, dict) and prompt.get(KEY) is not None:
                from vllm.score.engine.invalid import InvalidScoreRequest

                raise InvalidScoreRequest(
                    f"{KEY} is given, but the sampling parameters do not ask for scores: set "
                    "SamplingParams(score_mode=True).",
                    parameter=KEY,
                )
            request = wrapped(request_id, prompt, params, *rest, **named)
            if hasattr(params, ANY_ID):
                setattr(request.sampling_params, ANY_ID, True)  # the stock function copies them
            return request
        prompt = _rendered(processor, prompt, named.get("tokenization_kwargs"))
        plan = _plan(processor, prompt, params, named)
        lease = BytesLease(processor, plan)
        prompt = {**prompt, "prompt_token_ids": plan.engine_prompt}
        prompt.pop(KEY, None)
        prompt.pop(PLAN, None)
        carrier = _carrier(params, _cache_may_be_spoiled(processor, *rest, **named))
        request = wrapped(request_id, prompt, carrier, *rest, **named)
        _mark(request.sampling_params, plan, lease)
        return request

    return call(*args, **kwargs)


def _rendered(processor: Any, prompt: Any, tokenization_kwargs: Any) -> Any:
    """The engine's input for a raw prompt, whose length the targets must be checked against."""
    if isinstance(prompt, dict) and "type" in prompt:
        return prompt
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    renderer = processor.renderer
    tok_params = renderer.default_cmpl_tok_params.with_kwargs(**(tokenization_kwargs or {}))
    parsed = parse_model_prompt(processor.model_config, prompt)
    return renderer.render_cmpl([parsed], tok_params)[0]


def _plan(processor: Any, prompt: Any, params: Any, named: dict[str, Any]) -> Any:
    if isinstance(prompt.get(PLAN), ScorePlan):
        return prompt[PLAN]  # score() has checked everything once for all its requests
    from vllm.score.engine.support import check_configuration, check_prompt

    check_configuration(processor.vllm_config)
    params._verify_score_mode()  # again: fields may have been set since construction
    check_prompt(prompt, bool(named.get("resumable")))
    model = processor.model_config
    unlimited = getattr(processor, NO_CLIENT_LIMIT, False)
    facts = ModelFacts(
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        max_logprobs=None if unlimited else model.max_logprobs,
    )
    in_use = getattr(processor, "score_mode_bytes_in_use", 0)
    mark = getattr(params, MARK, None)
    view = not isinstance(mark, Explicit) or mark.stock_form
    tokenizer = processor.renderer.tokenizer
    return plan_tokenised(prompt, prompt.get(KEY), params, facts, tokenizer, in_use, view)


class BytesLease:
    """Counts a full-vocabulary result against the processor's limit while its request lives.

    The engine request hands it to the request's state in the output processor, which dies when
    the request finishes or is aborted.
    """

    def __init__(self, processor: Any, plan: Any) -> None:
        rows, width = plan.result_shape
        size = 4 * rows * width if plan.layout.top == FULL_VOCABULARY else 0
        processor.score_mode_bytes_in_use = getattr(processor, "score_mode_bytes_in_use", 0) + size

        def release() -> None:
            processor.score_mode_bytes_in_use -= size

        weakref.finalize(self, release)
        self._processor = processor

    def found_nan(self) -> None:
        """Have the KV cache emptied before another score request."""
        setattr(self._processor, NAN_SEEN, True)


def _cache_may_be_spoiled(
    processor: Any,
    supported_tasks: Any = None,
    arrival_time: Any = None,
    lora_request: Any = None,
    *_: Any,
    **__: Any,
) -> bool:
    """Whether cached prefixes of this request may have been computed with another's adapter.

    See `gpu_model_runner`: on a CPU, requests without an adapter beside others.
    """
    from vllm.platforms import current_platform

    lora = processor.vllm_config.lora_config is not None
    return lora and lora_request is None and bool(current_platform.is_cpu())


def _carrier(params: Any, skip_cache: bool) -> Any:
    """An ordinary request for one token: what the stock checks are shown."""
    skip = skip_cache or bool(params.skip_reading_prefix_cache)
    return copy.copy(_template(params.output_kind, skip))


@functools.cache
def _template(output_kind: Any, skip_reading_prefix_cache: bool) -> Any:
    from vllm import SamplingParams

    # Its copies skip the checks at construction, which take longer than the rest of admission.
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        detokenize=False,
        ignore_eos=True,
        watermarking=False,
        skip_reading_prefix_cache=skip_reading_prefix_cache,
        output_kind=output_kind,
        skip_clone=True,
    )


def _mark(engine_params: Any, plan: Any, lease: BytesLease) -> None:
    engine_params.score_mode = True
    engine_params.max_tokens = 0
    engine_params.score_statistics = list(plan.layout.statistics) or None
    engine_params.score_temperature = plan.layout.temperature
    engine_params.score_top_p = plan.layout.top_p
    engine_params._score_top = plan.layout.top
    engine_params._score_vocab_size = plan.vocab_size
    engine_params.prompt_logprob_token_ids = plan.targets
    engine_params.prompt_logprob_start = plan.first_row
    # The generation config's end-of-sequence ids mean nothing here.
    engine_params.stop_token_ids = []
    engine_params._all_stop_token_ids = set()
    # For the output processor of this same process; not fields, so they stay off the wire.
    engine_params.score_plan = plan
    engine_params.score_lease = lease


def apply(module: ModuleType) -> None:
    """Wrap admission. Instances bind the method at construction, so the class must be amended."""
    wrapt.wrap_function_wrapper(module, "InputProcessor.process_inputs", process_inputs)


PATCH = Patch(
    target="vllm.v1.engine.input_processor",
    contract={
        "InputProcessor.process_inputs": (
            "self",
            "request_id",
            "prompt",
            "params",
            "supported_tasks",
        ),
    },
    apply=apply,
    roles=("front end",),
    why="Targets are checked before anything runs, and take the channel that 0.32 has for "
    "prompt_logprob_token_ids.",
    how="The stock function sees an ordinary one-token request for the prompt without its last "
    "token; the score fields are set on the engine request that it returns.",
    risk="Checks that upstream adds for prompt_logprob_token_ids are not seen by score requests.",
    upstream="Pull request: a branch in process_inputs that calls the same planning function.",
    remove_when="process_inputs fills the channel for score requests.",
)
